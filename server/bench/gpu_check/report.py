"""The report of gpu-check: tables for people, a JSON document for programs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.bench.gpu_check.rows import Result, Row
from server.bench.gpu_check.targets import measured_targets
from server.bench.machine import describe_machine
from server.bench.table import align, number


def section_text(result: Result) -> str:
    """A section's title and status, its tables, and its error if it failed."""
    lines = [f"\n{result.title}: {result.status}, {result.seconds:.1f} s"]
    for table in dict.fromkeys(row.table for row in result.rows if not row.skipped):
        lines += ["", _table(table, [row for row in result.rows if row.table == table and not row.skipped])]
    lines += [f"skipped: {row.skipped}" for row in result.rows if row.skipped]
    if result.failed:
        lines.append(f"FAILED: {result.failed}")
    return "\n".join(lines)


def _table(name: str, rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    wrong = ["FAILED"] if any(row.failed for row in rows) else []
    cells = [[_cell(row.values.get(column, "")) for column in columns] for row in rows]
    if wrong:
        cells = [[*line, row.failed] for line, row in zip(cells, rows, strict=True)]
    return f"{name}\n{align([[*columns, *wrong], *cells])}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return number(value) if isinstance(value, float) else str(value)


def targets_text(results: Sequence[Result]) -> str:
    """Each measured value beside its target; "" = none was measured."""
    rows = [
        [target.name, number(target.value), f"{'>=' if target.at_least else '<='} {number(target.bound)}",
         "reached" if target.met else "MISSED"]
        for target in measured_targets(results)
    ]  # fmt: skip
    return "\ntargets\n" + align([["figure", "measured", "target", ""], *rows]) if rows else ""


def document(results: Sequence[Result], budget: float, seconds: float) -> dict[str, Any]:
    """The whole report, ready for JSON. ``gpu`` is null on a machine without one."""
    found = [row for result in results if result.name == "device" for row in result.table("gpu")]
    return {
        "machine": describe_machine(),
        "gpu": dict(found[0]) if found else None,
        "budget_seconds": budget,
        "seconds": round(seconds, 1),
        "sections": [result.as_json() for result in results],
        "targets": [
            {"figure": target.name, "measured": target.value, "asked": target.bound,
             "at_least": target.at_least, "met": target.met}
            for target in measured_targets(results)
        ],
    }  # fmt: skip
