"""``manylora train --check``: what can be known before weights are loaded, as a JSON object on stdout.

``{"error": null, "warnings": ["…"]}``, or ``{"error": "…", "warnings": []}`` and exit code 2.
Fine-tuning jobs are checked by it when they are posted (``server/finetune/jobs/validator.py``).
"""

from __future__ import annotations

import argparse
import json

from adapters.training.check import check_run
from server.config import ServerConfig
from server.finetune.command.config import check_adapter_name, serving_of, train_config
from server.finetune.command.errors import ASKED_WRONGLY, say, tell


def run_check(arguments: argparse.Namespace, server: ServerConfig) -> int:
    """The exit code."""
    try:
        check_adapter_name(arguments, server)
        warnings = check_run(train_config(arguments, server), serving_of(server))
    except ASKED_WRONGLY as error:
        print(json.dumps({"error": str(error), "warnings": []}))
        return tell(error)
    print(json.dumps({"error": None, "warnings": warnings}))
    for warning in warnings:
        say(f"Warning: {warning}")
    return 0
