"""The nouns: what a validated adapter is. No reading and no checking happens here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps that hold before any tensor byte is read.

    Attributes:
        max_rank: largest rank that any site may have.
        max_bytes: largest size of one adapter as served, in bytes.
    """

    max_rank: int
    max_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """The pair of one site; both are kept by rank row, so that a row of the pool is one contiguous copy.

    Attributes:
        a: [rank, in_features].
        b: [rank, out_features], that is PEFT's ``lora_B`` transposed and times the scale.
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """All that is known of an adapter without its weights.

    Attributes:
        digest: sha256 (hex) of what is served: the safetensors bytes and the scale of every site.
        ranks: site name → rank, only for the sites that have tensors.
        nbytes: size as served, in bytes of the serving dtype.
        base_model: ``base_model_name_or_path`` as the trainer wrote it.
        warnings: whole sentences; the adapter is served all the same.
    """

    digest: str
    ranks: Mapping[str, int] = field(hash=False)
    nbytes: int
    base_model: str | None
    warnings: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank of any site."""
        return max(self.ranks.values())


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter that can be served: ``weights`` has exactly the sites of ``info.ranks``."""

    info: AdapterInfo
    weights: Mapping[str, LoraWeights]
