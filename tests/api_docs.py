"""Writes the tables of fields in ``docs/api.md`` from the code. Run ``python -m tests.api_docs``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from server.http import fields
from server.http.fields import Rule, Rules

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def field_table(rules: Rules) -> str:
    """The Markdown table of one level, with a row for each kind of rule."""
    rows = "".join(
        f"| {kind} | {names} |\n"
        for kind in ("served", "no effect", "neutral", "refused")
        if (names := ", ".join(_cell(name, rule) for name, rule in rules.items() if rule.kind == kind))
    )
    return f"| | fields |\n|---|---|\n{rows}"


def with_tables(page: str) -> str:
    """The text of the page with its tables replaced by those from the code."""
    for heading, rules in fields.LEVELS.items():
        old = re.search(rf"(?<=^### {re.escape(heading)}\n\n)(?:\|.*\n)+", page, re.MULTILINE)
        assert old is not None, f"docs/api.md has no table below '### {heading}'"
        page = page[: old.start()] + field_table(rules) + page[old.end() :]
    return page


def _cell(name: str, rule: Rule) -> str:
    if rule.kind != "neutral":
        return f"`{name}`"
    return f"`{name}` ({' or '.join(f'`{json.dumps(value)}`' for value in rule.neutral)})"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
