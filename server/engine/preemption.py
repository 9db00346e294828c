"""Finds the running sequences to preempt so that a waiting one can start. Integers only.

It only finds them. ``scheduler`` preempts them.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.kv_cache import BlockManager, BlockTable, chain_root
from server.engine.sequence import Sequence


def find_victims(
    head: Sequence,
    candidates: Iterable[Sequence],
    blocks: BlockManager,
    num_running: int,
    free_running_slots: int,
) -> list[Sequence]:
    """The first ``candidates`` to preempt so that ``head`` can start.

    Empty if ``head`` can start without it, or if all candidates together are not enough.
    """
    victims: list[Sequence] = []
    missing: int | None = None
    for victim in candidates:
        if missing is None:
            missing = _missing_to_start(head, blocks, num_running)
        if missing <= 0 and len(victims) + free_running_slots > 0:
            break
        assert victim.table is not None
        victims.append(victim)
        missing -= blocks.held_alone(victim.table) + 1
    enough = missing is not None and missing <= 0
    return victims if enough else []


def _missing_to_start(sequence: Sequence, blocks: BlockManager, num_running: int) -> int:
    """Blocks that are missing for a sequence that has only what the prefix cache holds."""
    table = BlockTable(chain_root(sequence.digest))
    blocks.match(table, sequence.tokens)
    missing = blocks.missing(table, len(sequence.tokens) + 1, spare=num_running)
    blocks.release(table)
    return missing
