"""The way from a folder to an ``Adapter``: config, header, plan, then the values, each byte read once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from adapters.artifact.adapter import Adapter, AdapterInfo, Limits, LoraWeights
from adapters.artifact.config import MAX_CONFIG_BYTES, LoraSettings, parse_config
from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE, open_file, open_folder, read_exactly, read_file
from adapters.artifact.header import MAX_HEADER_BYTES, Header, TensorEntry, read_header
from adapters.artifact.plan import SitePlan, check_limits, plan_sites
from adapters.errors import AdapterChanged, AdapterInvalid
from adapters.sites import BaseLayout

_TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDEST_BYTES = 4
_DIGEST_VERSION = b"manylora adapter 1\n"


def load_adapter(
    folder: Path,
    layout: BaseLayout,
    limits: Limits,
    dtype: torch.dtype = torch.bfloat16,
    expect_digest: str | None = None,
) -> Adapter:
    """Reads, validates and converts the PEFT folder to the serving ``dtype``.

    Raises:
        AdapterInvalid: the folder is broken, or does not fit the base.
        AdapterUnsupported: it is a kind of adapter that cannot be served exactly.
        AdapterTooLarge: rank or bytes over ``limits``; no tensor was read.
        AdapterChanged: the digest is not ``expect_digest``, or the file was written to meanwhile.
    """
    max_file = limits.max_bytes * _WIDEST_BYTES // dtype.itemsize + MAX_HEADER_BYTES
    with open_folder(folder) as descriptor:
        settings = parse_config(read_file(descriptor, CONFIG_FILE, MAX_CONFIG_BYTES))
        with open_file(descriptor, WEIGHTS_FILE, max_file) as (stream, size):
            header = read_header(stream, size)
            plans = plan_sites(header.entries, settings, layout)
            nbytes = check_limits(plans, limits, dtype.itemsize)
            tensors, digest = _read_tensors(stream, header, plans, dtype)
    if expect_digest not in (None, digest):
        raise AdapterChanged("The adapter's content is no longer what was registered; register it again.")
    weights = {p.site.name: LoraWeights(tensors[p.a.name], tensors[p.b.name]) for p in plans}
    _check_not_base(weights.values())
    info = AdapterInfo(
        digest=digest,
        ranks=MappingProxyType({p.site.name: p.rank for p in plans}),
        nbytes=nbytes,
        base_model=settings.base_model,
        warnings=_warnings(settings, layout),
    )
    return Adapter(info, MappingProxyType(weights))


def inspect_adapter(
    folder: Path, layout: BaseLayout, limits: Limits, dtype: torch.dtype = torch.bfloat16
) -> AdapterInfo:
    """All of ``load_adapter``'s checks, values included, with the weights dropped. Raises the same."""
    return load_adapter(folder, layout, limits, dtype).info


def _read_tensors(
    stream: BinaryIO, header: Header, plans: Iterable[SitePlan], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors by name, as served, and the digest; one tensor's raw bytes are held at a time."""
    scales = {plan.b.name: plan.scale for plan in plans}
    digest = hashlib.sha256(
        _DIGEST_VERSION + json.dumps(scales, sort_keys=True).encode() + b"\n" + header.raw
    )
    tensors = {}
    for entry in header.entries:
        data = read_exactly(stream, entry.end - entry.begin, WEIGHTS_FILE)
        digest.update(data)
        tensors[entry.name] = _as_served(entry, data, scales.get(entry.name), dtype)
    return tensors, digest.hexdigest()


def _as_served(entry: TensorEntry, data: bytearray, scale: float | None, dtype: torch.dtype) -> torch.Tensor:
    """A as it is; B (the one with a ``scale``) scaled in float32 and transposed to rank rows."""
    raw = torch.frombuffer(data, dtype=_TORCH_DTYPE[entry.dtype]).view(entry.shape)
    scaled = raw if scale is None else (raw.float() * scale).t()
    served = scaled.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if _all_finite(served):
        return served
    if _all_finite(raw):
        short = str(dtype).removeprefix("torch.")
        raise AdapterInvalid(f"Tensor {entry.name!r} overflows {short} once scaled.")
    raise AdapterInvalid(f"Tensor {entry.name!r} has NaN or infinity in it; the training diverged.")


def _all_finite(tensor: torch.Tensor) -> bool:
    """By the extremes, which NaN spreads to: many times quicker than asking of every value."""
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _check_not_base(weights: Iterable[LoraWeights]) -> None:
    """An untrained adapter is the base under another name: surely a mistake."""
    if not any(bool(pair.a.any()) and bool(pair.b.any()) for pair in weights):
        raise AdapterInvalid(
            "Every site has lora_B (times the scale) or lora_A all zeros: it would be the base, untrained."
        )


def _warnings(settings: LoraSettings, layout: BaseLayout) -> tuple[str, ...]:
    if settings.base_model is None or _short(settings.base_model) == _short(layout.name_or_path):
        return ()
    return (f"It was trained on {settings.base_model!r}, but the base is {layout.name_or_path!r}.",)


def _short(name_or_path: str) -> str:
    """The model's own name: no owner, no folder, no mark of how it was quantised for training."""
    last = name_or_path.rstrip("/").rpartition("/")[2].casefold()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")
