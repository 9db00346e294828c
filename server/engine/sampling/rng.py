"""Random numbers that depend on (seed, index, position) alone.

No generator is shared. A sequence gets the same numbers in any batch, after a preemption, and on every
machine.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014): spreads every input bit over the output."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def answer_seed(seed: int, index: int) -> int:
    """The seed of one of a request's n answers."""
    return _mix(_mix(seed & _MASK) ^ index)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for the token at ``position``."""
    return (_mix(_mix(seed) ^ position) >> 11) / (1 << 53)
