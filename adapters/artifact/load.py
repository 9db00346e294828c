"""Loads a folder into an ``Adapter``: config, header, plan, then the values. Each byte is read once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from adapters.artifact.adapter import Adapter, AdapterInfo, Limits
from adapters.artifact.assemble import BaseWeights, assemble, without_copies
from adapters.artifact.chat_config import ChatConfig, read_chat_config
from adapters.artifact.config import MAX_CONFIG_BYTES, LoraSettings, parse_config
from adapters.artifact.files import CONFIG_FILE, WEIGHTS_FILE, open_file, open_folder, read_exactly, read_file
from adapters.artifact.header import Header, TensorEntry, header_limits, read_header
from adapters.artifact.plan import AdapterPlan, check_limits, plan_adapter
from adapters.artifact.recognise import recognise_on_error
from adapters.base_names import same_base
from adapters.errors import AdapterChanged, AdapterInvalid
from adapters.sites import BaseLayout

_TORCH_DTYPE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDEST_BYTES = 4
_COPIES = 3
"""Copies of one module in a file: ``modules_to_save`` with ``save_embedding_layers`` (see ``names.py``)."""
_PIECE_BYTES = 2**20
_ROUNDING = 1e-12
"""Relative to a sum in float64. A smaller result is only the rounding of terms that cancel."""
_DIGEST_VERSION = b"manylora adapter 1\n"


def load_adapter(
    folder: Path,
    layout: BaseLayout,
    limits: Limits,
    dtype: torch.dtype = torch.bfloat16,
    expect_digest: str | None = None,
    base: BaseWeights | None = None,
    ignore_chat_config: bool = False,
) -> Adapter:
    """Reads, validates and converts the PEFT folder to the serving ``dtype``.

    ``base``: the base's weights, which DoRA and biases are resolved against. ``ignore_chat_config``: the
    chat template in the folder is not read.

    Raises:
        AdapterInvalid: the folder is broken, or does not fit the base.
        AdapterUnsupported: it is a kind of adapter that cannot be served exactly.
        AdapterTooLarge: rank or bytes over ``limits``; no tensor was read.
        AdapterChanged: the digest is not ``expect_digest``, or the file was written to meanwhile.
    """
    read = _read(folder, layout, limits, dtype, base, ignore_chat_config)
    if expect_digest not in (None, read.info.digest):
        raise AdapterChanged("The adapter's content is no longer what was registered; register it again.")
    weights, extras = assemble(read.plan, read.tensors, layout, base, dtype)
    return Adapter(read.info, MappingProxyType(weights), extras)


def inspect_adapter(
    folder: Path,
    layout: BaseLayout,
    limits: Limits,
    dtype: torch.dtype = torch.bfloat16,
    base: BaseWeights | None = None,
    ignore_chat_config: bool = False,
) -> AdapterInfo:
    """Makes all of ``load_adapter``'s checks, also of the values. Raises the same errors."""
    return _read(folder, layout, limits, dtype, base, ignore_chat_config).info


@dataclass(frozen=True, slots=True)
class _Read:
    plan: AdapterPlan
    tensors: dict[str, torch.Tensor]
    info: AdapterInfo


def _read(
    folder: Path,
    layout: BaseLayout,
    limits: Limits,
    dtype: torch.dtype,
    base: BaseWeights | None,
    ignore_chat_config: bool,
) -> _Read:
    header_limit = header_limits(layout)
    max_file = _COPIES * limits.max_bytes * _WIDEST_BYTES // dtype.itemsize + header_limit.length
    with open_folder(folder) as descriptor, recognise_on_error(descriptor):
        settings = parse_config(read_file(descriptor, CONFIG_FILE, MAX_CONFIG_BYTES))
        with open_file(descriptor, WEIGHTS_FILE, max_file) as (stream, size):
            header = read_header(stream, size, header_limit)
            plan = plan_adapter(header.entries, settings, layout)
            check_limits(plan, limits, layout, dtype.itemsize)
            tensors, digest = _read_tensors(stream, header, plan, dtype)
        chat_config = None if ignore_chat_config else read_chat_config(descriptor)
    if base is not None:
        plan = without_copies(plan, tensors, layout, base)
    _check_not_base(plan, tensors)
    nbytes, extra = check_limits(plan, limits, layout, dtype.itemsize)
    info = AdapterInfo(
        digest=_digest_of(digest, chat_config),
        ranks=MappingProxyType({p.site.name: p.rank for p in plan.sites}),
        nbytes=nbytes,
        base_model=settings.base_model,
        warnings=(*_warnings(settings, layout), *plan.warnings),
        extra_bytes=extra,
        chat_config=chat_config,
    )
    return _Read(plan, tensors, info)


def _digest_of(weights: str, chat_config: ChatConfig | None) -> str:
    """The digest of everything that changes answers."""
    if chat_config is None:
        return weights
    return hashlib.sha256(weights.encode() + b"\n" + chat_config.digested()).hexdigest()


def _read_tensors(
    stream: BinaryIO, header: Header, plan: AdapterPlan, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], str]:
    """Tensors by name for ``assemble``, and the digest.

    Only one tensor's raw bytes are in memory at a time.
    """
    scales = {pair.b.name: pair.scale for pair in plan.pairs}
    kept_wide = {entry.name for pair in plan.pairs for entry in (pair.magnitude, pair.bias) if entry}
    kept_wide |= {pair.b.name for pair in plan.pairs if pair.magnitude}
    digest = hashlib.sha256(
        _DIGEST_VERSION + json.dumps(scales, sort_keys=True).encode() + b"\n" + header.raw
    )
    tensors, used = {}, plan.used
    for entry in header.entries:
        if entry.name not in used:
            _digest_unread(stream, entry, digest)
            continue
        data = read_exactly(stream, entry.end - entry.begin, WEIGHTS_FILE)
        digest.update(data)
        wanted = torch.float32 if entry.name in kept_wide else dtype
        tensors[entry.name] = _as_served(entry, data, scales.get(entry.name), wanted)
    return tensors, digest.hexdigest()


def _digest_unread(stream: BinaryIO, entry: TensorEntry, digest: hashlib._Hash) -> None:
    """Read a tensor that is not served in small pieces, because it may be large."""
    for begin in range(entry.begin, entry.end, _PIECE_BYTES):
        digest.update(read_exactly(stream, min(_PIECE_BYTES, entry.end - begin), WEIGHTS_FILE))


def _as_served(entry: TensorEntry, data: bytearray, scale: float | None, dtype: torch.dtype) -> torch.Tensor:
    """The tensor unchanged.

    Only B, which has a ``scale``, is scaled in float32 and transposed to rank rows.
    """
    raw = torch.frombuffer(data, dtype=_TORCH_DTYPE[entry.dtype]).view(entry.shape)
    scaled = raw if scale is None else (raw.float() * scale).t()
    served = scaled.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if _all_finite(served):
        return served
    if _all_finite(raw):
        short = str(dtype).removeprefix("torch.")
        raise AdapterInvalid(
            f"Tensor {entry.name!r} overflows {short} after scaling; train with a smaller lora_alpha."
        )
    raise AdapterInvalid(
        f"Tensor {entry.name!r} contains NaN or infinity; training diverged, "
        "so train again with a lower learning rate."
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Checks minimum and maximum, which are NaN if any value is.

    This is much faster than checking each value.
    """
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _check_not_base(plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse an untrained adapter, because it would be the base under another name."""
    replaced = plan.replaced.matrices or plan.replaced.norms or plan.replaced.biases
    if replaced or any(
        pair.magnitude or (pair.bias and tensors[pair.bias.name].any()) for pair in plan.pairs
    ):
        return
    if not any(_changes(tensors[pair.a.name], tensors[pair.b.name]) for pair in plan.pairs):
        raise AdapterInvalid(
            "The adapter is untrained: lora_B times lora_A is zero at every site, so it would answer "
            "like the base. Train it first."
        )


def _changes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the product of a [rank, in] and b [rank, out] is not zero, tested on one random input."""
    rows = a.any(dim=1) & b.any(dim=1)
    if not bool(rows.any()):
        return False
    probe = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner, b = a[rows].double() @ probe, b[rows].double()
    return bool(((inner @ b).abs() > _ROUNDING * (inner.abs() @ b.abs())).any())


def _warnings(settings: LoraSettings, layout: BaseLayout) -> tuple[str, ...]:
    if not settings.base_model or same_base(settings.base_model, layout.name_or_path):
        return settings.warnings
    other = f"It was trained on {settings.base_model!r}, but the base is {layout.name_or_path!r}."
    return (other, *settings.warnings)
