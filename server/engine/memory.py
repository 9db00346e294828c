"""Divides a GPU's memory. Integers only, without torch.

--gpu-memory-utilization * total = already used + one step + reserves + KV cache
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.config import ConfigError

KV_CACHE_ON_CPU = 1 << 30
"""Bytes of the KV cache on a CPU, whose memory other programs need too."""

LORAS_ON_CPU = 16

RANK = 16
"""Rank rows that a typical adapter takes at each site."""

GRAPHS = 512 << 20
"""Bytes reserved for CUDA graphs, which are captured after everything else is allocated. A graph of a few
hundred launches takes up to 100 KB for each launch. There are a dozen graphs, and they share a memory pool.
"""

LATER = 256 << 20
"""Bytes reserved for what CUDA allocates on first use (kernel code, cuBLAS workspaces, adapters being copied)
and for the allocator's fragmentation.
"""

BYTES_A_LOGIT = 24
"""Bytes for each logit while tokens are sampled: float32 logits after the processors, probabilities and their
cumulative sum, indices of the sorted ones, and the logits of one more step that is in flight.
"""


class Meter(Protocol):
    """A device's memory in bytes.

    Attributes:
        total: the whole memory.
    """

    total: int

    def free(self) -> int:
        """Bytes that no process holds. The allocator's cache counts as held."""

    def ours(self) -> int:
        """Bytes that this process's allocator holds."""

    def release(self) -> None:
        """Free the allocator's cache."""


@dataclass(frozen=True, slots=True)
class Share:
    """``nbytes`` for ``what``; ``flags`` names the flags that change it."""

    what: str
    nbytes: int
    flags: str | None = None

    def __str__(self) -> str:
        return f"{gib(self.nbytes)} for {self.what}" + (f" ({self.flags})" if self.flags else "")


def usable(total: int, utilization: float) -> int:
    """The bytes that all processes together may use."""
    return int(total * utilization)


def rows_that_fit(answers: int, max_rank: int, row_bytes: int, room: int) -> int:
    """Rank rows for one adapter of rank ``RANK`` for each of ``answers``, in at most a quarter of ``room``.

    The device never needs more adapters than concurrent answers. The KV cache gets most of the memory,
    because it limits the number of answers. One adapter of the largest rank always fits.
    """
    wanted = min(answers * RANK, room // 4 // row_bytes)
    return max(wanted // RANK * RANK, max_rank)


def left_for_kv(total: int, utilization: float, shares: Sequence[Share], least: int) -> int:
    """Bytes for the KV cache, after all other shares.

    Raises:
        ConfigError: less than ``least`` is left.
    """
    left = usable(total, utilization) - sum(share.nbytes for share in shares)
    if left >= least:
        return left
    largest_first = sorted(shares, key=lambda share: -share.nbytes)
    raise ConfigError(
        f"--gpu-memory-utilization {utilization:g}: {gib(usable(total, utilization))} of the GPU's "
        f"{gib(total)} may be used. These are taken: {'; '.join(map(str, largest_first))}. That leaves "
        f"{gib(max(left, 0))} for keys and values, which need at least {gib(least)}; raise "
        "--gpu-memory-utilization, or give less to one of these"
    )


def gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
