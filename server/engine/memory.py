"""How a GPU's memory is shared out: by integers, without torch.

--gpu-memory-utilization of the whole = what is taken already + a step + what may come later + keys and values
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.config import ConfigError

KV_CACHE_ON_CPU = 1 << 30
"""Bytes for keys and values on a CPU, whose memory others need too."""

LORAS_ON_CPU = 16

RANK = 16
"""Rows that an adapter is thought to take at each site."""

GRAPHS = 512 << 20
"""Bytes left for CUDA graphs, which are captured after the rest is taken: up to a hundred KB for each of a
few hundred launches in each of a dozen graphs, and the memory that they share.
"""

LATER = 256 << 20
"""Bytes left for what CUDA takes when it needs it first: code of kernels, cuBLAS's workspaces, copies of
adapters under way; and for what the allocator cannot use because it lies in pieces.
"""

BYTES_A_LOGIT = 24
"""While tokens are drawn: a row's logits in float32 shaped, as probabilities and added up, places of the
sorted ones, and the logits of one step more, which nobody has read yet.
"""


class Meter(Protocol):
    """A device's memory in bytes.

    Attributes:
        total: all of it.
    """

    total: int

    def free(self) -> int:
        """What nobody holds; what the allocator keeps for later is held."""

    def ours(self) -> int:
        """What this process' allocator holds."""

    def release(self) -> None:
        """Give back what the allocator keeps for later."""


@dataclass(frozen=True, slots=True)
class Share:
    """``nbytes`` for ``what``; ``flags`` change it."""

    what: str
    nbytes: int
    flags: str | None = None

    def __str__(self) -> str:
        return f"{gib(self.nbytes)} for {self.what}" + (f" ({self.flags})" if self.flags else "")


def usable(total: int, utilization: float) -> int:
    """The bytes that may be taken, by whomever."""
    return int(total * utilization)


def rows_that_fit(answers: int, max_rank: int, row_bytes: int, room: int) -> int:
    """Rank rows for an adapter of rank ``RANK`` for each of ``answers``, if a quarter of ``room`` holds them.

    More adapters than answers at once are never needed on the device; and keys and values, which decide how
    many answers there can be, shall get most. One adapter of the largest rank fits in any case.
    """
    wanted = min(answers * RANK, room // 4 // row_bytes)
    return max(wanted // RANK * RANK, max_rank)


def left_for_kv(total: int, utilization: float, shares: Sequence[Share], least: int) -> int:
    """Bytes for keys and values, when the others have their shares.

    Raises:
        ConfigError: less than ``least`` is left.
    """
    left = usable(total, utilization) - sum(share.nbytes for share in shares)
    if left >= least:
        return left
    largest_first = sorted(shares, key=lambda share: -share.nbytes)
    raise ConfigError(
        f"--gpu-memory-utilization {utilization:g}: {gib(usable(total, utilization))} of the GPU's "
        f"{gib(total)} may be used, of which are taken: {'; '.join(map(str, largest_first))}. That leaves "
        f"{gib(max(left, 0))} for keys and values, which need at least {gib(least)}; raise "
        "--gpu-memory-utilization, or give less to one of these"
    )


def gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
