"""``manylora train --check`` checks a run before weights are loaded, and prints a JSON object on stdout.

It prints ``{"error": null, "warnings": ["…"]}``, or ``{"error": "…", "warnings": []}`` with exit code 2.
``server/finetune/jobs/validator.py`` runs it when a fine-tuning job is posted.
"""

from __future__ import annotations

import argparse
import json

from adapters.training.check import check_run
from server.config import ServerConfig
from server.finetune.command.config import check_adapter_name, serving_of, train_config
from server.finetune.command.errors import USER_ERRORS, report_error, say


def run_check(arguments: argparse.Namespace, server: ServerConfig) -> int:
    """Check the run. Returns the exit code."""
    try:
        check_adapter_name(arguments, server)
        warnings = check_run(train_config(arguments, server), serving_of(server))
    except USER_ERRORS as error:
        print(json.dumps({"error": str(error), "warnings": []}))
        return report_error(error)
    print(json.dumps({"error": None, "warnings": warnings}))
    for warning in warnings:
        say(f"Warning: {warning}")
    return 0
