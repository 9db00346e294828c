"""Device memory for extras, which are everything except rank rows: vectors at sites, norms, embeddings,
heads.

Few adapters have extras, and their sizes differ widely. So each adapter gets separate tensors, within one
bound in bytes. This file moves them in and out; ``residency.py`` decides which adapters stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.artifact import Adjustment, EmbeddingOrHead, Extras, LoraWeights
from adapters.pool.pointer_table import PointerTable
from adapters.pool.site_pool import SitePool, lone_pool
from adapters.sites import Site
from adapters.transfer import send_coalesced


@dataclass(frozen=True, slots=True, eq=False)
class ResidentEmbeddingOrHead:
    """An ``EmbeddingOrHead`` on the device.

    Attributes:
        matrix: [vocabulary, hidden], or None. A head's is packed for the model by ``ExtrasPool.pack_head``.
        table: [vocabulary, rank], the embedding's A transposed. A token's row is the input to ``pool``.
        pool: a pool with only this adapter's pair and adjustment, in slot 0; or None.
    """

    matrix: Tensor | None
    table: Tensor | None
    pool: SitePool | None


@dataclass(frozen=True, slots=True, eq=False)
class ResidentExtras:
    """One adapter's extras on the device, except its adjustments at sites, which are in the sites' pools."""

    norms: Mapping[str, Mapping[str, Tensor]]
    embedding: ResidentEmbeddingOrHead | None
    head: ResidentEmbeddingOrHead | None


class ExtrasPool:
    """The resident extras by slot.

    Args:
        norms: the names of the base's norms.
        capacity: bytes for all adapters.

    Attributes:
        norms: for each norm a table of adapters' weights by slot, for native kernels.
        pack_head, norm_weight: convert a head's matrix and a norm's weights (float32) for the model's
            kernels. They are set before the first adapter is loaded.
    """

    def __init__(self, norms: Iterable[str], capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self.norms = {name: PointerTable() for name in norms}
        self.pack_head: Callable[[Tensor], Tensor] = lambda matrix: matrix
        self.norm_weight: Callable[[Tensor], Tensor] = lambda weight: weight.float()
        self._dtype, self._device = dtype, device
        self._resident: dict[int, ResidentExtras] = {}
        self._bytes: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes in use. Any thread may ask while another loads an adapter."""
        return sum(list(self._bytes.values()))

    def get(self, slot: int) -> ResidentExtras | None:
        return self._resident.get(slot)

    def reserve(self, slot: int, nbytes: int) -> None:
        """Reserve bytes. The caller has checked that they are free."""
        self._bytes[slot] = nbytes
        for table in self.norms.values():
            table.ensure_slot(slot)

    def write(self, slot: int, extras: Extras) -> None:
        if not (extras.norms or extras.embedding or extras.head):
            return
        norms = {
            norm: {role: tensor.to(self._device) for role, tensor in parameters.items()}
            for norm, parameters in extras.norms.items()
        }
        for norm in norms.keys() & self.norms.keys():
            if "weight" in norms[norm]:
                self.norms[norm].put(slot, self.norm_weight(norms[norm]["weight"]))
        self._resident[slot] = ResidentExtras(
            norms,
            self._embedding_or_head(extras.embedding, True),
            self._embedding_or_head(extras.head, False),
        )

    def free(self, slot: int) -> None:
        del self._bytes[slot]
        self._resident.pop(slot, None)
        for table in self.norms.values():
            table.drop(slot)

    def check_integrity(self, slots: Set[int]) -> None:
        """Assert that nothing is held for freed slots (for tests)."""
        assert self._bytes.keys() == slots, "bytes of a slot that is gone"
        assert self._resident.keys() <= slots, "tensors of a slot that is gone"
        assert self.used <= self.capacity, "more bytes are taken than there are"
        for name, table in self.norms.items():
            assert table.slots <= self._resident.keys(), f"{name} has weights of a slot that is gone"

    def _embedding_or_head(
        self, replacement: EmbeddingOrHead | None, embeds: bool
    ) -> ResidentEmbeddingOrHead | None:
        if replacement is None:
            return None
        lora, matrix, table = replacement.lora, replacement.matrix, None
        if matrix is not None:
            matrix = matrix.to(self._device) if embeds else self.pack_head(matrix.to(self._device))
        if embeds and lora is not None:
            table = lora.a.t().contiguous().to(self._device)
            lora = LoraWeights(torch.eye(len(lora.a), dtype=lora.a.dtype), lora.b)
        return ResidentEmbeddingOrHead(matrix, table, self._pool(lora, replacement.adjustment))

    def _pool(self, lora: LoraWeights | None, adjustment: Adjustment | None) -> SitePool | None:
        vectors = (adjustment.scale, adjustment.shift) if adjustment is not None else ()
        outputs = [len(vector) for vector in vectors if vector is not None]
        if lora is None:
            if not outputs:
                return None
            lora = LoraWeights(torch.empty(0, 0), torch.empty(0, outputs[0]))
        rank = len(lora.a)
        pool = lone_pool(Site("", lora.a.shape[1], lora.b.shape[1]), rank, self._dtype, self._device)
        if rank:
            pool.write(0, list(range(rank)), lora)
        if adjustment is not None:
            pool.adjust(0, moved_adjustments({"": adjustment}, self._device)[""])
        pool.send(0)
        return pool


def moved_adjustments(adjustments: Mapping[str, Adjustment], device: torch.device) -> dict[str, Adjustment]:
    """The adjustments on ``device``, moved by one copy."""
    pairs = [(adjustment.scale, adjustment.shift) for adjustment in adjustments.values()]
    moved = iter(send_coalesced([vector for pair in pairs for vector in pair if vector is not None], device))
    return {
        name: Adjustment(*(None if vector is None else next(moved) for vector in pair))
        for name, pair in zip(adjustments, pairs, strict=True)
    }
