"""Pages of rows with OpenAI's cursors: a page starts after the last row of the page before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from server.errors import InvalidRequest
from server.finetune.jobs.database import Job, JobEvent, StoredFile

Row = TypeVar("Row", Job, JobEvent, StoredFile)


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """Some rows, and whether more rows follow."""

    rows: list[Row]
    has_more: bool


def page_of(
    session: Session,
    wanted: Select[Row],
    table: type[Row],
    after: str | None,
    limit: int,
    ascending: bool,
) -> Page[Row]:
    """The first ``limit`` rows of ``wanted`` after the one with the id ``after``. Raises InvalidRequest."""
    if after is not None:
        seq = _seq_of(session, table, after)
        wanted = wanted.where(table.seq > seq if ascending else table.seq < seq)
    ordered = wanted.order_by(table.seq if ascending else table.seq.desc())
    rows = list(session.scalars(ordered.limit(limit + 1)))
    return Page(rows[:limit], len(rows) > limit)


def _seq_of(session: Session, table: type[Row], row_id: str) -> int:
    seq = session.scalar(select(table.seq).where(table.id == row_id))
    if seq is None:
        raise InvalidRequest(f"'after' is {row_id!r:.100}, which is not in this list.", "after")
    return seq
