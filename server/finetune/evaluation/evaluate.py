"""Compares an adapter with the base in the serving engine: the same steps, batches and kernels.

The adapter may be in any folder. No client can use it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from adapters.artifact.config import MAX_CONFIG_BYTES, parse_config
from adapters.artifact.files import CONFIG_FILE, open_folder, read_file
from adapters.training.dataset import Dataset
from server.config import ServerConfig, from_args
from server.engine.build import build_parts
from server.finetune.evaluation.examiner import Examiner, Tick
from server.finetune.evaluation.result import Evaluation, Model

_FRUGAL = ("--kv-cache-memory", "1GiB", "--enforce-eager")


def evaluate_adapter(
    base: str,
    home: Path,
    quantization: str,
    device: str,
    data: Dataset,
    adapter: Path,
    replaced: Path | None = None,
    threads: int | None = None,
    progress: bool = False,
    head_quantization: str = "none",
    hf_overrides: str = "",
    allow_special_tokens: bool = False,
    ignore_adapter_templates: bool = False,
    tick: Tick = lambda *_: None,
) -> Evaluation:
    """Measure an adapter, the base, and the version that the adapter would replace.

    It uses little GPU memory, because a server may run on the same GPU.

    Args:
        base, home, quantization, head_quantization, hf_overrides, device, allow_special_tokens,
            ignore_adapter_templates: as for ``manylora serve``.
        data: held-out conversations.
        adapter, replaced: PEFT folders at any place.
        threads: the threads of the CPU kernels; None = one for each CPU of this process.
        progress: show a bar on stderr.
        tick: called after every step.

    Raises:
        ConfigError, BaseModelError: the base cannot be served with these settings.
        AdapterError: a folder is not an adapter of this base that can be served.
        TrainingError: rows cannot be encoded as in training.
        EvaluationFailed: a question does not fit into the context, or the engine could not finish a row.
    """
    flags = ["--base", base, "--home", str(home), "--device", device]
    flags += ["--quantization", quantization, "--head-quantization", head_quantization]
    flags += ["--hf-overrides", hf_overrides] if hf_overrides else []
    flags += [] if threads is None else ["--threads", str(threads)]
    flags += ["--allow-special-tokens"] if allow_special_tokens else []
    flags += ["--ignore-adapter-templates"] if ignore_adapter_templates else []
    flags += _FRUGAL
    return evaluate(from_args(flags, environ={}), data, adapter, replaced, progress, tick)


def evaluate(
    config: ServerConfig,
    data: Dataset,
    adapter: Path,
    replaced: Path | None = None,
    progress: bool = False,
    tick: Tick = lambda *_: None,
) -> Evaluation:
    """See ``evaluate_adapter``. The adapter folder in ``config`` is ignored."""
    folders: dict[Model, Path] = {"adapter": adapter.resolve()}
    if replaced is not None:
        folders["replaced"] = replaced.resolve()
    with tempfile.TemporaryDirectory() as empty:
        parts = build_parts(_sized_for(config, folders.values(), Path(empty)))
    try:
        return Examiner(parts, folders, progress, tick).examine(data)
    finally:
        parts.close()


def _sized_for(config: ServerConfig, folders: Iterable[Path], adapter_dir: Path) -> ServerConfig:
    """``config`` with room for these adapters and without a prefix cache.

    Tokens from the prefix cache are not computed, so they would not be scored.
    """
    ranks = [_rank(folder) for folder in folders]
    adapters = replace(
        config.adapters,
        folder=adapter_dir,
        max_loras=len(ranks),
        max_lora_rank=max(ranks),
        pool_rows=sum(ranks),
    )
    return replace(config, adapters=adapters, engine=replace(config.engine, prefix_caching=False))


def _rank(folder: Path) -> int:
    """The largest rank of any module. Raises AdapterError."""
    with open_folder(folder) as descriptor:
        settings = parse_config(read_file(descriptor, CONFIG_FILE, MAX_CONFIG_BYTES))
    return max([settings.r, *settings.rank_pattern.values()])
