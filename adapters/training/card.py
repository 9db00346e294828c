"""The model card: an adapter's base, data, settings and results."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapters.base import PreparedBase
from adapters.training.recipe import EXECUTION, TrainConfig

_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
# Paths and file names describe the machine, not the adapter.
_LEFT_OUT = (*EXECUTION, "data", "eval_data", "base", "deepspeed", "fsdp_config")


def write_card(
    folder: Path, config: TrainConfig, base: PreparedBase, data_sha256: str, metrics: Mapping[str, Any]
) -> None:
    """Write ``README.md`` with the front matter that the model hub reads."""
    chosen = {name: value for name, value in config.as_json().items() if name not in _LEFT_OUT}
    versions = {name: _version(name) for name in _VERSIONS}
    origin = {"base": base.name, "base sha256": base.digest, "data sha256": data_sha256}
    figures = {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    figures |= {f"pruned, {name}": value for name, value in metrics.get("pruned", {}).items()}
    parts = [_front_matter(base.source), "# LoRA adapter", "Trained with manylora on the 4-bit base below."]
    sections = {"Made from": origin, "Metrics": figures, "Configuration": chosen, "Versions": versions}
    parts += [f"## {title}\n\n{_table(rows)}" for title, rows in sections.items()]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a base in bf16 uses no bitsandbytes
        return None


def _front_matter(base_model: str) -> str:
    hub_id = [] if base_model.startswith("/") else [f"base_model: {base_model}"]
    return "\n".join(["---", *hub_id, "library_name: peft", "tags:", "- lora", "---"])


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
