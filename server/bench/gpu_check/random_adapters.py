"""Random adapters that take little time and memory: their weights are views of one random buffer.

Each adapter's view starts at a different offset, so no two adapters are equal.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from adapters.artifact import Adapter, AdapterInfo, LoraWeights
from adapters.registry import Version
from adapters.sites import Site
from server.bench.serving.synthetic import save_adapter

_STEP = 4099
"""The offset between two adapters' views. It is prime, so no row of one adapter is a row of another."""

_MOST = 512


class RandomAdapters:
    """Adapters by number, which must be less than ``_MOST``.

    Args:
        sites: the sites of the base.
        most_rank: the largest rank of an adapter.
    """

    def __init__(self, sites: Mapping[str, Site], most_rank: int) -> None:
        self._sites = sites
        self._row_width = sum(site.in_features + site.out_features for site in sites.values())
        length = most_rank * self._row_width + _MOST * _STEP
        std = max(site.in_features for site in sites.values()) ** -0.5
        generator = torch.Generator().manual_seed(1)
        self._ribbon = torch.empty(length, dtype=torch.bfloat16).normal_(0.0, std, generator=generator)
        self._ranks: dict[str, tuple[int, int]] = {}

    def version(self, number: int, rank: int) -> Version:
        """A version to pass to the engine. ``load`` makes its weights."""
        digest = f"random-{number}-{rank}"
        self._ranks[digest] = number, rank
        return Version(digest, digest, Path(digest), self._info(digest, rank), time.time())

    def load(self, version: Version) -> Adapter:
        """Make the weights of a version. ``Residency`` calls this in place of reading files."""
        return Adapter(version.info, self.weights(*self._ranks[version.digest]))

    def weights(self, number: int, rank: int) -> dict[str, LoraWeights]:
        """Views of the buffer by site: A [rank, in_features] and B [rank, out_features]."""
        place = number * _STEP
        pairs = {}
        for name, site in self._sites.items():
            middle = place + rank * site.in_features
            end = middle + rank * site.out_features
            a = self._ribbon[place:middle].view(rank, site.in_features)
            b = self._ribbon[middle:end].view(rank, site.out_features)
            pairs[name] = LoraWeights(a, b)
            place = end
        return pairs

    def save(self, number: int, rank: int, folder: Path, base: str) -> None:
        """Write the same adapter as a PEFT folder."""
        tensors = {}
        for name, pair in self.weights(number, rank).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.clone()
            tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.t().contiguous()
        save_adapter(folder, tensors, list(self._sites.values()), rank, base)

    def _info(self, digest: str, rank: int) -> AdapterInfo:
        ranks = dict.fromkeys(self._sites, rank)
        return AdapterInfo(digest, ranks, 2 * rank * self._row_width, None, ())
