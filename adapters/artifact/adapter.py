"""The data types of a validated adapter. Nothing is read or checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from adapters.artifact.chat_config import ChatConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps that are checked before any tensor byte is read.

    Attributes:
        max_rank: largest rank that any site may have.
        max_bytes: largest size of one adapter as served, in bytes.
    """

    max_rank: int
    max_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """The LoRA pair of one site. Both matrices are stored by rank row, so a row of the pool is one contiguous
    copy.

    Attributes:
        a: [rank, in_features].
        b: [rank, out_features]: PEFT's ``lora_B``, transposed and multiplied by the scale (DoRA's too).
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adjustment:
    """How an adapter changes the base's output at one site:  y = scale * base(x) + shift + lora(x).

    DoRA scales; biases shift. None means a scale of 1 or a shift of 0.

    Attributes:
        scale, shift: float32 [out_features].
    """

    scale: torch.Tensor | None
    shift: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingOrHead:
    """What an adapter changes at the embedding or at the output head.

    Attributes:
        matrix: [vocabulary, hidden] instead of the base's, or None.
        lora: as at any site; the embedding's input is a one-hot row of the vocabulary.
        adjustment: as at any site.
    """

    matrix: torch.Tensor | None
    lora: LoraWeights | None
    adjustment: Adjustment | None


@dataclass(frozen=True, slots=True, eq=False)
class Extras:
    """Everything except the plain pairs at linears inside the blocks.

    Attributes:
        adjustments: by site.
        norms: by norm, its parameters instead of the base's.
        embedding, head: None = the base's.
    """

    adjustments: Mapping[str, Adjustment] = field(default_factory=dict)
    norms: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    embedding: EmbeddingOrHead | None = None
    head: EmbeddingOrHead | None = None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What is known about an adapter without its weights.

    Attributes:
        digest: sha256 (hex) of what is served: the safetensors bytes, the scale of every site and
            ``chat_config``.
        ranks: site name → rank, only for the sites that have tensors.
        nbytes: size as served, in bytes of the serving dtype.
        base_model: ``base_model_name_or_path`` as the trainer wrote it.
        warnings: whole sentences; they do not stop the adapter from being served.
        extra_bytes: how many of ``nbytes`` are ``Extras``.
        chat_config: its chat template and end-of-answer tokens; part of the digest. None = the base's.
    """

    digest: str
    ranks: Mapping[str, int] = field(hash=False)
    nbytes: int
    base_model: str | None
    warnings: tuple[str, ...]
    extra_bytes: int = 0
    chat_config: ChatConfig | None = None

    @property
    def rank(self) -> int:
        """The largest rank of any linear inside a block; 0 if there is none."""
        return max(self.ranks.values(), default=0)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter that can be served. ``weights`` has exactly the sites of ``info.ranks``."""

    info: AdapterInfo
    weights: Mapping[str, LoraWeights]
    extras: Extras = field(default_factory=Extras)
