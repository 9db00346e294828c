"""The sections in their order, and their shares of the time. No torch: their code is imported later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from server.bench.gpu_check.context import Context
    from server.bench.gpu_check.rows import Row


@dataclass(frozen=True, slots=True)
class Section:
    """Attributes: ``share`` of the whole time; what one leaves over is the next ones'."""

    name: str
    title: str
    share: float

    def load(self) -> Callable[[Context], Iterator[Row]]:
        """Its ``run``: gives its rows one by one, and looks at the clock in between."""
        run: Callable[[Context], Iterator[Row]] = import_module(f"{__package__}.{self.name}").run
        return run


SECTIONS = (
    Section("device", "the GPU and its limits", 0.03),
    Section("lora_kernels", "LoRA kernels against the reference", 0.14),
    Section("block_kernels", "a block's kernels against the reference", 0.05),
    Section("nf4_products", "products of NF4 weights, and which is chosen", 0.05),
    Section("attention", "attention over pages against the reference", 0.06),
    Section("exactness", "whole models: CUDA graphs on and off, and PEFT", 0.17),
    Section("decode", "decoding beside its roofline", 0.25),
    Section("loads", "adapters that are not on the device yet", 0.08),
    Section("peft_peer", "PEFT's adapter_names on the same base", 0.13),
)
