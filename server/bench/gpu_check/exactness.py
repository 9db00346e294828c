"""Section ``exactness``: runs whole random models in the server's engine; compares a tiny one with PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from adapters.base import LoadedBase, Quantization
from server.bench.gpu_check.agreement import compare
from server.bench.gpu_check.bases import SHAPES_BY_SIZE, bytes_of, random_base, why_not
from server.bench.gpu_check.context import Context
from server.bench.gpu_check.peft_loop import PeftLoop
from server.bench.gpu_check.random_adapters import RandomAdapters
from server.bench.gpu_check.rows import Row, skipped
from server.bench.gpu_check.served import Answer, Driver, Sizes, fallbacks_of, hold, make_prompt, served

_RANKS = (16, 1, 64, 8, 3, 32)
_SEQUENCES = 14
_TOKENS = 24
_LONGEST = 90
_ROOM = 1.5
"""A base needs its own bytes times this: room for adapters, keys and values, and a step's buffers."""

_SECONDS = {"tiny": 5.0, "llama-1b": 15.0, "llama-8b": 30.0}


def run(context: Context) -> Iterator[Row]:
    """For each base: compare CUDA graphs with eager steps. Compare the tiny bases with PEFT too."""
    shapes = ("tiny",) if context.gpu is None else tuple(SHAPES_BY_SIZE)
    for shape in shapes:
        for quantization in ("nf4", "none"):
            yield from _of_base(context, shape, quantization)


def _of_base(context: Context, shape: str, quantization: Quantization) -> Iterator[Row]:
    reason = why_not(quantization) or _too_large(context, shape, quantization)
    if reason is not None:
        yield skipped("graphs", f"{shape}, {quantization}: {reason}")
        return
    context.check_time(_SECONDS[shape])
    eager, name, slow = _answers(context, shape, quantization, eager=True)
    graphs, graphed, slower = _answers(context, shape, quantization, eager=False)
    agreement = compare(graphs, eager)
    values = {"base": shape, "weights": quantization, "eager": name, "graphs": graphed}
    failed = agreement.failed or slow or slower or _not_graphed(context, graphed)
    yield Row("graphs", {**values, **agreement.values}, failed)
    if shape == "tiny":
        agreement = compare(*_with_peft(context, quantization))
        yield Row("PEFT", {"base": shape, "weights": quantization, **agreement.values}, agreement.failed)


def _not_graphed(context: Context, name: str) -> str:
    """An error if a Llama does not decode in graphs on a GPU with Triton; "" = none."""
    missing = context.gpu is not None and find_spec("triton") is not None and "graphs" not in name
    return f"decoding is not in CUDA graphs, but {name!r}; --log FILE records why" if missing else ""


def _too_large(context: Context, shape: str, quantization: Quantization) -> str | None:
    if context.gpu is None:
        return None
    needed, free = _ROOM * bytes_of(shape, quantization), torch.cuda.mem_get_info()[0]
    return f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free" if needed > free else None


def _answers(
    context: Context, shape: str, quantization: Quantization, eager: bool
) -> tuple[dict[str, Answer], str, str]:
    """The answers of a new engine, the name of its model, and its fallbacks."""
    base = random_base(shape, quantization, context.device)
    adapters = RandomAdapters(base.layout.sites, max(_RANKS))
    with served(base, _sizes(eager), context.scratch, adapters.load) as parts:
        versions = [adapters.version(number, rank) for number, rank in enumerate(_RANKS)]
        hold(parts, versions)
        driver = Driver(parts)
        for i in range(_SEQUENCES):
            version = versions[i % len(versions)] if i % 4 else None
            prompt = make_prompt(i, 5 + 6 * i, base.model.config.vocab_size)
            driver.ask(str(i), prompt, version, _TOKENS, margins=True)
        return driver.finish(), parts.model.name, fallbacks_of(parts)


def _sizes(eager: bool) -> Sizes:
    room = -(-sum(_RANKS) // 16)
    return Sizes(_SEQUENCES, _SEQUENCES * (_LONGEST + _TOKENS), room, max(_RANKS), eager=eager)


def _with_peft(context: Context, quantization: Quantization) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Our answers, then PEFT's, with the same adapters from the same folders."""
    base, home = random_base("tiny", quantization, context.device), context.scratch / quantization
    folders = _folders(base, home / "adapters")
    prompts = {name: make_prompt(i, 9 + 5 * i, 1000) for i, name in enumerate(folders)}
    with served(base, _sizes(eager=False), home) as parts:
        driver = Driver(parts)
        for name, prompt in prompts.items():
            driver.ask(name, prompt, parts.registry.register(name, folders[name], replace=True), _TOKENS)
        ours = driver.finish()
    peft = PeftLoop(random_base("tiny", quantization, context.device))
    for name, folder in folders.items():
        peft.load(name, folder)
    return ours, {name: peft.greedy(name, prompt, _TOKENS) for name, prompt in prompts.items()}


def _folders(base: LoadedBase, root: Path) -> dict[str, Path]:
    adapters = RandomAdapters(base.layout.sites, max(_RANKS))
    folders = {f"lora-{number}": root / f"lora-{number}" for number in range(len(_RANKS))}
    for number, (folder, rank) in enumerate(zip(folders.values(), _RANKS, strict=True)):
        adapters.save(number, rank, folder, base.layout.name_or_path)
    return folders
