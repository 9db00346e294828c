"""``manylora bench step``: the time of each part of a decode step, and the least time the machine allows.

The least time is that of ``roofline.py``, with the machine's bandwidth and rate, which are measured first.
The model runs in this process, without HTTP.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.bench.roofline import WEIGHT_BYTES, Machine, Stack, Step, Work, works
from server.config.values import argument, integer

if TYPE_CHECKING:
    from server.engine.build import Parts

Seconds = dict[str, float]

PARTS = ("linears", "lora", "attention", "rows", "head", "sampling", "rest")


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``manylora bench step``."""
    step = kinds.add_parser("step", help="measure the parts of a decode step", description=__doc__)
    step.add_argument("--base", default="smollm2-135m", metavar="MODEL", help="(default: %(default)s)")
    step.add_argument(
        "--home", type=Path, default=Path(".manylora"), metavar="DIR", help="(default: %(default)s)"
    )
    step.add_argument(
        "--head-quantization", choices=("nf4", "none"), default="none", help="(default: %(default)s)"
    )
    positive = argument(integer(1))
    step.add_argument(
        "--num-seqs", type=positive, nargs="+", default=[1, 16], metavar="N", help="(default: 1 16)"
    )
    step.add_argument(
        "--num-adapters", type=argument(integer(0)), default=16, metavar="N", help="(default: %(default)s)"
    )
    step.add_argument("--adapter-rank", type=positive, default=16, metavar="R", help="(default: %(default)s)")
    step.add_argument(
        "--context", type=positive, default=200, metavar="TOKENS", help="(default: %(default)s)"
    )
    step.add_argument("--steps", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    step.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a table for each number of sequences, with adapters and without."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = _build(arguments, Path(scratch))
        machine = measure_machine()
        print(f"memory {machine.bandwidth / 1e9:.1f} GB/s, bf16 {machine.rate / 1e9:.0f} GFLOP/s")
        names = [entry.name for entry in parts.registry.entries()]
        for count in arguments.num_seqs:
            for adapters in (names[:count], []):
                seconds, context = _measure(parts, arguments, count, adapters)
                works = _works(parts, arguments, count, len(adapters), context)
                print(f"\n{count} sequences on {len(adapters)} adapters, {context:.0f} tokens each")
                print("\n".join(_rows(seconds, works, machine)))
    return 0


def _build(arguments: argparse.Namespace, scratch: Path) -> Parts:
    from adapters.base import prepare_base
    from server.bench.errors import BenchError
    from server.bench.serving.synthetic import write_adapters
    from server.config import from_args
    from server.engine.build import build_parts

    prepared = prepare_base(arguments.base, arguments.home, head_quantization=arguments.head_quantization)
    adapters = write_adapters(prepared, scratch, arguments.num_adapters, arguments.adapter_rank, seed=0)
    flags = ["--base", arguments.base, "--home", str(arguments.home), "--adapter-dir", str(scratch)]
    flags += ["--head-quantization", arguments.head_quantization]
    sizes = ["--max-loras", str(arguments.num_adapters), "--max-lora-rank", str(arguments.adapter_rank)]
    parts = build_parts(from_args([*flags, *sizes, "--no-enable-prefix-caching"], environ={}))
    for name, folder in adapters.items():
        parts.registry.register(name, folder, replace=True)
    if parts.model.name != "fused":
        raise BenchError(
            "only the parts of the fused CPU model can be measured, and this base or machine does not run it"
        )
    return parts


def measure_machine() -> Machine:
    """Copy half a gigabyte, and multiply two matrices that no cache holds. The best of several tries."""
    import torch

    source, target = torch.ones(1 << 28, dtype=torch.uint8), torch.empty(1 << 28, dtype=torch.uint8)
    a, b = (torch.ones(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    copy = min(_timed(lambda: target.copy_(source)) for _ in range(5))
    product = min(_timed(lambda: torch.mm(a, b)) for _ in range(5))
    return Machine(bandwidth=2 * source.nbytes / copy, rate=2 * 2048**3 / product)


def _timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _measure(
    parts: Parts, arguments: argparse.Namespace, count: int, adapters: list[str]
) -> tuple[Seconds, float]:
    """Seconds of a step by part, and tokens of a sequence: means over steps in which all sequences decode."""
    from adapters.kernels.cpu.structs import STACK_PARTS

    model: Any = parts.model
    names = _start(parts, arguments, count, adapters)
    running = parts.engine.scheduler.running
    assert len(running) == count, "a sequence ended before all of them decoded"
    context = sum(len(sequence.tokens) for sequence in running) / count + arguments.steps / 2
    model.nanoseconds[:] = 0
    head, sampling = Stopwatch(), Stopwatch()
    began = time.perf_counter()
    with head.timing(model, "head"), sampling.timing(parts.engine, "sample"):
        for _ in range(arguments.steps):
            parts.engine.step()
    total = time.perf_counter() - began
    assert len(running) == count, "a sequence ended before the others"
    for name in names:
        parts.engine.abort(name)
    seconds = dict(zip(STACK_PARTS, (model.nanoseconds / 1e9).tolist(), strict=True))
    seconds |= {"head": head.seconds, "sampling": sampling.seconds}
    seconds["rest"] = total - sum(seconds.values())
    return {part: seconds[part] / arguments.steps for part in PARTS}, context


def _start(parts: Parts, arguments: argparse.Namespace, count: int, adapters: list[str]) -> list[str]:
    """Add the requests and step until all of them decode. Returns their ids."""
    from server.engine.interface import GenerationRequest
    from server.engine.sampling_params import SamplingParams

    meanwhile = count * arguments.context  # the first ones decode in every step that computes others' prompts
    sampling = SamplingParams(max_tokens=arguments.steps + meanwhile, temperature=0.0, ignore_eos=True)
    names = [f"step{i}" for i in range(count)]
    for i, name in enumerate(names):
        prompt = tuple((31 * i + 7 * j) % 1000 + 1000 for j in range(arguments.context))
        version = parts.registry.checkout(adapters[i % len(adapters)]) if adapters else None
        parts.engine.add(GenerationRequest(name, prompt, None, sampling), version, seed=0)
    while parts.engine.scheduler.num_decoding < count:
        if not parts.engine.step():
            time.sleep(0.001)  # nothing was ready: let the adapter loader run
    return names


class Stopwatch:
    """Adds up the seconds spent in one function of an object."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def timing(self, owner: object, name: str) -> Iterator[None]:
        call = getattr(owner, name)

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            result = call(*args)
            self.seconds += time.perf_counter() - began
            return result

        setattr(owner, name, timed)
        yield
        setattr(owner, name, call)


def _works(
    parts: Parts, arguments: argparse.Namespace, count: int, adapters: int, context: float
) -> dict[str, Work]:
    """The least that each part of a step of ``count`` sequences must read and compute."""
    model: Any = parts.model
    sites = parts.residency.pool.sites.values()
    stack = Stack(
        layers=len(model.shapes),
        linears=[(pool.native.inputs, pool.native.outputs) for pool in sites],
        head=model.head_size,
        kv_width=sum(2 * shape.kv_heads * shape.key_dim for shape in model.shapes.values()),
        heads_per_kv_head=model.heads_per_kv_head,
    )
    rank = arguments.adapter_rank
    step = Step(
        sequences=count,
        context=context,
        read_ranks=rank * adapters,
        used_ranks=rank * count if adapters else 0,
    )
    nf4, bf16 = WEIGHT_BYTES["nf4, scales in bf16"], WEIGHT_BYTES["bf16"]
    return works(stack, step, nf4, nf4 if model.head.is_4bit else bf16)


def _rows(seconds: Seconds, works: dict[str, Work], machine: Machine) -> Iterator[str]:
    yield f"{'':10}{'ms':>9}{'floor':>9}{'ratio':>8}"
    floors = {part: works.get(part, Work()).floor(machine) for part in PARTS}
    for part in (*PARTS, "step"):
        took = sum(seconds.values()) if part == "step" else seconds[part]
        floor = sum(floors.values()) if part == "step" else floors[part]
        ratio = f"{took / floor:8.2f}" if floor else ""
        yield f"{part:10}{took * 1e3:9.3f}{floor * 1e3:9.3f}{ratio}"
