"""Random adapters that cost next to nothing to make: windows onto one ribbon of random numbers.

No two adapters look through the same window, so no two are equal; a kernel reads each one's own bytes.
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
"""From one adapter's window to the next one's: a prime, so that no row of one is a row of another."""

_MOST = 512


class RandomAdapters:
    """Adapters by number, below ``_MOST``.

    Args:
        sites: of the base.
        most_rank: no adapter has more.
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
        """To be given to the engine; ``load`` then makes its weights."""
        digest = f"random-{number}-{rank}"
        self._ranks[digest] = number, rank
        return Version(digest, digest, Path(digest), self._info(digest, rank), time.time())

    def load(self, version: Version) -> Adapter:
        """What ``Residency`` reads a version with."""
        return Adapter(version.info, self.weights(*self._ranks[version.digest]))

    def weights(self, number: int, rank: int) -> dict[str, LoraWeights]:
        """A [rank, in_features] and B [rank, out_features] by site; views."""
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
        """The same adapter as a PEFT folder."""
        tensors = {}
        for name, pair in self.weights(number, rank).items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a.clone()
            tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b.t().contiguous()
        save_adapter(folder, tensors, list(self._sites.values()), rank, base)

    def _info(self, digest: str, rank: int) -> AdapterInfo:
        ranks = dict.fromkeys(self._sites, rank)
        return AdapterInfo(digest, ranks, 2 * rank * self._row_width, None, ())
