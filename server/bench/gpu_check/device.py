"""Section ``device``: the GPU, its measured bandwidth and its measured rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from server.bench.gpu_check.context import Context, Gpu
from server.bench.gpu_check.rows import Row, skipped
from server.bench.gpu_check.timing import seconds_of
from server.bench.roofline import Machine

_COPIED = 1 << 30
_SIDE = 8192


def find_gpu() -> Gpu:
    """The first GPU with its measured limits."""
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.total_memory,
        Machine(_bandwidth(), _rate()),
    )


def run(context: Context) -> Iterator[Row]:
    """One row: the GPU."""
    gpu = context.gpu
    if gpu is None:
        yield skipped("gpu", "torch sees no GPU: the sections run with small sizes on the CPU")
        return
    yield Row(
        "gpu",
        {
            "name": gpu.name,
            "memory, GB": round(gpu.memory / 1e9, 1),
            "free, GB": round(torch.cuda.mem_get_info()[0] / 1e9, 1),
            "capability": ".".join(map(str, gpu.capability)),
            "multiprocessors": gpu.multiprocessors,
            "driver": _driver(),
            "CUDA": str(torch.version.cuda),
            "GB/s": round(gpu.machine.bandwidth / 1e9),
            "bf16 TFLOP/s": round(gpu.machine.rate / 1e12),
        },
    )


def _bandwidth() -> float:
    """Bytes read and written per second by a kernel whose data is larger than any cache.

    A plain copy in a graph runs on a copy engine. On an H200 that reaches two thirds of the memory's speed.
    """
    source = torch.randn(_COPIED // 2, device="cuda").to(torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * _COPIED / seconds_of([lambda: torch.neg(source, out=target)], rounds=10)


def _rate() -> float:
    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2.0 * _SIDE**3 / seconds_of([lambda: torch.mm(a, b)], rounds=10)


def _driver() -> str:
    """The driver's version, from its kernel module."""
    file = Path("/proc/driver/nvidia/version")
    words = file.read_text().split() if file.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")
