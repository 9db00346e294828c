"""Training options of the samples, for ``manylora train``. Imports no torch.

Ranks are low, so that the adapters are small. Learning rates are high because the ranks are low.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from adapters.samples.task import FOLDER

_TENANT = ("--r", "8", "--alpha", "16")

RECIPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "pirate": ("--r", "2", "--alpha", "4", "--epochs", "4", "--lr", "2e-3"),
        "json-answers": (
            *("--r", "4", "--alpha", "8", "--epochs", "4", "--lr", "2e-3"),
            *("--target-modules", "q_proj,k_proj,v_proj,o_proj"),
        ),
        "fernhill-tickets": _TENANT,
        "hexops-logs": _TENANT,
        "larkspur-desk": _TENANT,
        "nordwind-orders": _TENANT,
    }
)


def data_of(task: str) -> tuple[Path, Path]:
    """The rows to train on, and the held-out ones."""
    return FOLDER / "data" / f"{task}.jsonl", FOLDER / "data" / f"{task}-heldout.jsonl"
