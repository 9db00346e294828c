"""The sections in the order they run, with their shares of the time. No torch: the code is imported later."""

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
    """Attributes: ``share`` of the whole time. Time that a section leaves over goes to the next ones."""

    name: str
    title: str
    share: float

    def load(self) -> Callable[[Context], Iterator[Row]]:
        """The section's ``run``. It yields rows one by one, and checks the time between them."""
        run: Callable[[Context], Iterator[Row]] = import_module(f"{__package__}.{self.name}").run
        return run


SECTIONS = (
    Section("device", "the GPU and its limits", 0.03),
    Section("lora_kernels", "LoRA kernels against the reference", 0.14),
    Section("block_kernels", "a block's kernels against the reference", 0.05),
    Section("nf4_products", "products of NF4 weights, and which one is chosen", 0.05),
    Section("attention", "attention over pages against the reference", 0.06),
    Section("exactness", "whole models: with and without CUDA graphs, and PEFT", 0.17),
    Section("decode", "decoding compared with its roofline", 0.25),
    Section("loads", "loading adapters onto the device", 0.08),
    Section("peft_peer", "PEFT's adapter_names on the same base", 0.13),
)
