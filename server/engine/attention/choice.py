"""Chooses the attention backend for a model on this machine. Heavy backends are imported only when chosen.

On a GPU it is the first of ``BUILDS`` that supports the model, on a CPU the native kernel. Otherwise it is
torch's attention over gathered pages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from server.engine.attention import AttentionBackend, AttentionSpec, KvShape
from server.engine.attention.flash_check import what_is_wrong
from server.engine.attention.flash_kernels import PAGE, FlashAttn, TorchVarlen
from server.engine.attention.flash_paged import FlashPaged, PagedKernel
from server.engine.attention.torch_paged import TorchPaged
from server.engine.unsupported import Unsupported

log = logging.getLogger("manylora.engine")

GATHERED = 16
"""Best block size, in tokens, on a CPU and for gathered pages."""


@dataclass(frozen=True)
class Build:
    """One build of FlashAttention-2.

    Attributes:
        load: loads it; raises ImportError if it is not installed.
        page: a block must hold a multiple of this number of tokens.
        suits: its best block size, in tokens.
        softcap: whether it supports a soft cap of scores.
    """

    name: str
    load: Callable[[], PagedKernel]
    page: int
    suits: int
    softcap: bool


def _triton() -> PagedKernel:
    from server.engine.attention.triton_paged import TritonPaged

    return TritonPaged()


BUILDS = (
    Build("flash-attn", FlashAttn.load, PAGE, PAGE, softcap=True),
    Build("PyTorch's varlen_attn", TorchVarlen.load, PAGE, PAGE, softcap=False),
    # Smaller blocks share more prefixes, but each step sends larger block tables to the device.
    Build("the Triton kernel", _triton, 1, 64, softcap=True),
)


def choose(
    shapes: Mapping[int, KvShape],
    specs: Mapping[int, AttentionSpec],
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
) -> AttentionBackend:
    """The backend for this model on this machine. Logs why a better one is not used.

    Args:
        shapes, specs: by layer.
        max_length: tokens of the longest sequence there can be.
    """
    if device.type == "cuda":
        found = first_fit(BUILDS, shapes, specs, block_size, device, dtype)
        if found is not None:
            return FlashPaged(found[1], block_size, device, dtype, max_length)
    from adapters.kernels.cpu import library

    native = library() if device.type == "cpu" and dtype == torch.bfloat16 else None
    if native is not None:
        from server.engine.attention.native_paged import NativePaged

        if NativePaged.fits(shapes, block_size):
            return NativePaged(native, block_size)
    return TorchPaged(block_size, device, dtype)


def preferred_block_size(text_config: Any, device: torch.device, dtype: torch.dtype) -> int:
    """The best block size, in tokens, for this device and the layers in transformers' ``text_config``."""
    if device.type != "cuda":
        return GATHERED
    dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    spec = AttentionSpec(dim**-0.5, softcap=getattr(text_config, "attn_logit_softcapping", None))
    found = first_fit(BUILDS, {0: KvShape(1, dim, dim)}, {0: spec}, None, device, dtype)
    return GATHERED if found is None else found[0].suits


def first_fit(
    builds: Sequence[Build],
    shapes: Mapping[int, KvShape],
    specs: Mapping[int, AttentionSpec],
    block_size: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Build, PagedKernel] | None:
    """The first build that supports these layers on this device; ``block_size`` None = its best one."""
    layers = frozenset((shape, specs[layer]) for layer, shape in shapes.items())
    for build in builds:
        found = _load(build, layers, block_size or build.suits, device, dtype)
        if not isinstance(found, Unsupported):
            return build, found
        _log_once(build.name, found.reason)
    return None


@cache
def _load(
    build: Build,
    layers: frozenset[tuple[KvShape, AttentionSpec]],
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> PagedKernel | Unsupported:
    """The kernel, loaded and checked on this device. The result is cached."""
    unsupported = _check(build, layers, block_size, device, dtype)
    if unsupported is not None:
        return unsupported
    try:
        kernel = build.load()
    except (ImportError, OSError) as error:
        return Unsupported(f"it is not installed ({error})")
    for layer in layers:
        if (wrong := what_is_wrong(kernel, *layer, block_size, device, dtype)) is not None:
            return Unsupported(wrong)
    return kernel


@cache
def _log_once(name: str, reason: str) -> None:
    log.info("attention without %s: %s", name, reason)


def _check(
    build: Build,
    layers: frozenset[tuple[KvShape, AttentionSpec]],
    block_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Unsupported | None:
    """Why the build does not support the device, the layers or the block size, or None."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return Unsupported("the GPU is older than compute capability 8.0")
    if dtype not in (torch.bfloat16, torch.float16):
        return Unsupported(f"the model computes in {dtype}, not in 16 bits")
    for shape, spec in layers:
        if shape.key_dim != shape.value_dim:
            return Unsupported(f"keys have {shape.key_dim} dimensions and values {shape.value_dim}")
        if shape.key_dim > 256 or shape.key_dim % 8:
            return Unsupported(f"heads of {shape.key_dim} dimensions are not a multiple of 8 up to 256")
        if spec.softcap is not None and not build.softcap:
            return Unsupported("it has no soft cap of scores, which this model needs")
    if block_size % build.page:
        return Unsupported(
            f"a block holds {block_size} tokens, not a multiple of {build.page} (--block-size)"
        )
    return None
