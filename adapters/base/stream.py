"""Quantises a transformers folder layer by layer, from its files to a checkpoint's shards.

The memory it takes: one shard of the checkpoint (at most ``SHARD`` bytes, or one layer), one layer of the
source, and ``_SCRATCH`` bytes for each weight of the largest matrix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from adapters.base.headers import INDEX, Header, read_headers
from adapters.base.memory import check_disk, check_memory
from adapters.base.quiet import quiet_libraries
from adapters.base.reading import convert_read_errors
from adapters.base.shard_folder import ShardFolder
from adapters.base.skeleton import CannotStream, Skeleton, load_skeleton
from adapters.errors import BaseModelError

logger = logging.getLogger(__name__)

SHARD = 512 << 20
"""Bytes of a shard, if a layer takes no more."""

_LAYER = re.compile(r"(.*?\.\d+)\.")
_LOG_SECONDS = 10.0
_WORK = 20
"""Bytes that are copied in the time that a weight is quantised."""
_SCRATCH = 20
"""Bytes that bitsandbytes takes for each weight while it quantises on a CPU: copies in float32."""
_VERSIONS = ("bitsandbytes", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that are converted together: those of a layer, or one of the others.

    Attributes:
        keys: their names in the files.
        source_bytes, stored_bytes: their size there, and in the checkpoint.
        quantized: how many weights are quantised.
        largest: the most of them in one parameter.
    """

    keys: tuple[str, ...]
    source_bytes: int
    stored_bytes: int
    quantized: int
    largest: int

    @property
    def work(self) -> int:
        """What it costs, in the time that a byte takes to be copied."""
        return self.source_bytes + _WORK * self.quantized

    @property
    def memory(self) -> int:
        """Bytes that it takes beside its result."""
        return self.source_bytes + _SCRATCH * self.largest


@dataclass(frozen=True)
class Plan:
    """What ``stream`` does. ``shards`` are the parts of each shard, by file name."""

    skeleton: Skeleton
    shards: Mapping[str, tuple[Part, ...]]
    digest: str


def plan_stream(folder: Path, head: str) -> Plan:
    """Read the headers and try all conversions without weights.

    Raises:
        CannotStream: the model has to be converted as a whole.
        BaseCorrupt, BaseModelError: it cannot be used.
    """
    with convert_read_errors(folder):
        headers = read_headers(folder)
        model = load_skeleton(folder)
    keys = _parts(headers)
    try:
        skeleton = Skeleton(model, headers, head)
        filled = skeleton.check(keys)
    except (BaseModelError, CannotStream, MemoryError):
        raise
    except Exception as error:  # transformers' functions are not made for parts, and may fail in any way
        raise CannotStream(f"{type(error).__name__} ({error})") from error
    parts = [_part(skeleton, headers, *one) for one in zip(keys, filled, strict=True)]
    shards = _shards(parts)
    return Plan(skeleton, shards, _digest(shards, head))


def stream(plan: Plan, folder: Path, device: torch.device) -> None:
    """Write the shards that are not in ``folder`` yet, their index and the model's configs."""
    shards = ShardFolder(folder, f"{plan.digest} {device.type}")
    _check_room(plan, shards, folder)
    progress = _Progress(plan, shards)
    index: dict[str, str] = {}
    for name, parts in plan.shards.items():
        if name not in shards:
            shards.add(name, _converted(plan.skeleton, parts, device, progress))
        index |= dict.fromkeys(shards.tensors(name), name)
    plan.skeleton.save_configs(folder)
    if len(plan.shards) > 1:
        total = sum(shards.size(name) for name in plan.shards)
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    shards.close()


def _converted(
    skeleton: Skeleton, parts: tuple[Part, ...], device: torch.device, progress: _Progress
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        with quiet_libraries(progress=False):
            tensors |= skeleton.convert(part.keys, device)
        progress.add(part)
    return tensors


def _part(
    skeleton: Skeleton, headers: Mapping[str, Header], keys: tuple[str, ...], names: Collection[str]
) -> Part:
    quantized = [skeleton.quantized_weights(name) for name in names]
    return Part(
        keys,
        source_bytes=sum(headers[key].nbytes for key in keys),
        stored_bytes=skeleton.stored_bytes(names),
        quantized=sum(quantized),
        largest=max(quantized, default=0),
    )


def _check_room(plan: Plan, shards: ShardFolder, folder: Path) -> None:
    """Raises BaseTooLarge if the shards that are missing need more memory or disk space than there is."""
    missing = [parts for name, parts in plan.shards.items() if name not in shards]
    stored = [sum(part.stored_bytes for part in parts) for parts in missing]
    working = [max(part.memory for part in parts) for parts in missing]
    needed = max((sum(both) for both in zip(stored, working, strict=True)), default=0)
    remedy = "Free some: end other programs, or raise the container's limit."
    check_memory(needed, torch.device("cpu"), "To quantise the base, layer by layer,", remedy)
    check_disk(sum(stored), folder, "The quantised base")


def _parts(headers: Mapping[str, Header]) -> list[tuple[str, ...]]:
    """The names of the tensors, together by layer, in the order of the layers."""
    groups: dict[str, list[str]] = {}
    for key in sorted(headers, key=_natural):
        layer = _LAYER.match(key)
        groups.setdefault(layer[1] if layer else key, []).append(key)
    return [tuple(keys) for keys in groups.values()]


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in key.split(".")]


def _shards(parts: list[Part]) -> dict[str, tuple[Part, ...]]:
    """Fill shards with parts in their order. Names are those that transformers gives shards."""
    shards: list[list[Part]] = []
    for part in parts:
        if not shards or sum(one.stored_bytes for one in shards[-1]) + part.stored_bytes > SHARD:
            shards.append([])
        shards[-1].append(part)
    if len(shards) == 1:
        return {"model.safetensors": tuple(shards[0])}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": tuple(shard)
        for number, shard in enumerate(shards, start=1)
    }


def _digest(shards: Mapping[str, tuple[Part, ...]], head: str) -> str:
    """Changes with anything that changes a shard's content; the source itself is in the folder's name."""
    content = {name: [part.keys for part in parts] for name, parts in shards.items()}
    versions = [version(package) for package in _VERSIONS]
    return hashlib.sha256(json.dumps([content, head, versions]).encode()).hexdigest()


class _Progress:
    """Logs how much is done and how long the rest takes, at the speed so far."""

    def __init__(self, plan: Plan, shards: ShardFolder) -> None:
        self._total = sum(part.source_bytes for parts in plan.shards.values() for part in parts)
        missing = [part for name, parts in plan.shards.items() if name not in shards for part in parts]
        self._bytes = self._total - sum(part.source_bytes for part in missing)
        self._work, self._left = 0, sum(part.work for part in missing)
        self._start = self._logged = time.monotonic()

    def add(self, part: Part) -> None:
        self._bytes += part.source_bytes
        self._work += part.work
        self._left -= part.work
        now = time.monotonic()
        if now - self._logged < _LOG_SECONDS or not self._left:
            return
        self._logged = now
        seconds = self._left * (now - self._start) / self._work
        logger.info(
            "Quantised %.1f of %.1f GB; about %.0f s left.", self._bytes / 1e9, self._total / 1e9, seconds
        )
