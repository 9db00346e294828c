"""The rows that a section gives, and its result. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool


class Skip(Exception):
    """The rest of a section cannot run on this machine. The message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One result.

    Attributes:
        table: rows of one table have the same columns.
        values: by column, ready for JSON.
        failed: what is wrong; "" = nothing.
        skipped: why there is no result; "" = there is one.
    """

    table: str
    values: Mapping[str, Value]
    failed: str = ""
    skipped: str = ""


def skipped(table: str, reason: str) -> Row:
    return Row(table, {}, skipped=reason)


@dataclass(slots=True)
class Result:
    """The rows and the status of one section.

    Attributes:
        seconds: how long the section took.
        failed: why the section did not finish; "" = it finished.
    """

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    failed: str = ""

    @property
    def status(self) -> str:
        if self.failed or any(row.failed for row in self.rows):
            return "failed"
        return "ok" if any(not row.skipped for row in self.rows) else "skipped"

    def table(self, name: str) -> list[Mapping[str, Value]]:
        """The values of a table's rows, without failed and skipped ones."""
        return [row.values for row in self.rows if row.table == name and not row.failed and not row.skipped]

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"table": row.table, **row.values}
            | ({"failed": row.failed} if row.failed else {})
            | ({"skipped": row.skipped} if row.skipped else {})
            for row in self.rows
        ]
        head = {"section": self.name, "title": self.title, "status": self.status}
        ended = {"seconds": round(self.seconds, 2)} | ({"failed": self.failed} if self.failed else {})
        return {**head, **ended, "rows": rows}
