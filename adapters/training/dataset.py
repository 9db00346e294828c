"""Reads a file of training rows into conversations, or reports every problem with its line. Imports no torch.

The file has one JSON object on each line, or one JSON array of objects (like LLaMA-Factory's files).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from adapters.errors import DatasetInvalid, DatasetUnreadable, LineProblem
from adapters.strict_json import JsonInvalid, parse_json
from adapters.text.messages import Message
from adapters.training.file_kind import EXAMPLE, HEAD_BYTES, not_json, unreadable
from adapters.training.formats import Format, detect, read_conversation
from adapters.training.turns import RowInvalid

__all__ = ["Dataset", "DatasetInvalid", "LineProblem", "Row", "read_dataset"]


REASONING = "messages[].reasoning_content"
"""The name of an assistant's reasoning in reports."""


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation.

    Attributes:
        line: the line where it begins, from 1.
        messages: ``role`` (system, user, assistant) and ``content``; the last is the assistant's.
        context_only: indices of the assistant's messages that are only context (OpenAI's ``weight`` 0).
    """

    line: int
    messages: list[Message]
    context_only: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Dataset:
    """A file whose rows are all valid.

    Attributes:
        format: the name of the detected row format.
        sha256: the hex digest of the file's bytes.
        unused_fields: for each field that the model does not see (``messages[].name``), the number of its
            rows.
        reasoning: the number of rows with an assistant's reasoning, which only some chat templates use.
    """

    path: Path
    format: str
    rows: list[Row]
    sha256: str
    unused_fields: dict[str, int]
    reasoning: int = 0

    def unused_by(self, takes_reasoning: bool) -> dict[str, int]:
        """The fields that a base does not use. Its chat template may or may not use reasoning."""
        if takes_reasoning or not self.reasoning:
            return self.unused_fields
        return self.unused_fields | {REASONING: self.reasoning}


@dataclass(slots=True)
class _Reading:
    """The results so far."""

    format: Format | None = None
    rows: list[Row] = field(default_factory=list)
    problems: list[LineProblem] = field(default_factory=list)
    count: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    reasoning: int = 0

    def add(self, line: int, row: Any) -> None:
        """Raises RowInvalid."""
        if isinstance(row, RowInvalid):
            raise row
        if not isinstance(row, dict):
            raise RowInvalid("is not a JSON object")
        found = detect(row)
        self.format = self.format or found
        if found.name != self.format.name:
            raise RowInvalid(f"is a {found.name} row, but the file began with {self.format.name}")
        conversation = read_conversation(row, found)
        self.rows.append(Row(line, conversation.messages, conversation.context_only))
        self.unused.update(conversation.unused)
        self.reasoning += conversation.reasons

    def report(self, line: int, reason: str) -> None:
        self.count += 1
        if len(self.problems) < DatasetInvalid.MAX_KEPT:
            self.problems.append(LineProblem(line, reason))


def read_dataset(path: Path) -> Dataset:
    """Read and check every row.

    Raises:
        DatasetInvalid: there are rows that cannot be used.
        DatasetUnreadable: the file has no rows, is of another type, or cannot be read.
    """
    reading, digest = _Reading(), hashlib.sha256()
    try:
        with path.open("rb") as file:
            if kind := not_json(file.peek(HEAD_BYTES)[:HEAD_BYTES]):
                raise DatasetUnreadable(path.name, f"is {kind}.")
            for line, row in _rows(_lines(file, digest.update)):
                try:
                    reading.add(line, row)
                except RowInvalid as problem:
                    reading.report(line, str(problem))
    except OSError as error:
        raise DatasetUnreadable(path.name, unreadable(error, path)) from error
    if reading.count == 0 and not reading.rows:
        raise DatasetUnreadable(
            path.name, f"has no rows; give one JSON object on each line, such as {EXAMPLE}."
        )
    if reading.problems or reading.format is None:
        raise DatasetInvalid(path.name, reading.problems, reading.count)
    unused = dict(sorted(reading.unused.items()))
    return Dataset(path, reading.format.name, reading.rows, digest.hexdigest(), unused, reading.reasoning)


def _lines(file: BinaryIO, update: Callable[[bytes], None]) -> Iterator[tuple[int, bytes]]:
    """Each line with its number; ``update`` gets every byte of the file."""
    for number, line in enumerate(file, 1):
        update(line)
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _rows(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Any]]:
    """Each row as its JSON value, or as a RowInvalid. Empty lines at the end are dropped."""
    empty: list[int] = []
    for number, line in lines:
        if not line.strip():
            empty.append(number)
            continue
        if number == len(empty) + 1 and line.lstrip().startswith(b"["):
            rest = b"".join(text for _, text in lines)
            yield from _array(b"\n" * len(empty) + line + rest)
            return
        yield from ((gap, RowInvalid("is empty")) for gap in empty)
        empty = []
        yield number, _parsed(line)


def _array(data: bytes) -> Iterator[tuple[int, Any]]:
    """The items of one JSON array, each with its first line."""
    items = _parsed(data)
    if isinstance(items, RowInvalid):
        yield 1, items
        return
    text, decoder = data.decode("utf-8"), json.JSONDecoder()
    line, end = 1, 0
    begin = text.index("[") + 1
    for item in items:
        while text[begin] in ", \t\r\n":
            begin += 1
        line += text.count("\n", end, begin)
        yield line, item
        end = decoder.raw_decode(text, begin)[1]
        line += text.count("\n", begin, end)
        begin = end


def _parsed(data: bytes) -> Any:
    """The JSON value in ``data``, or a RowInvalid."""
    try:
        return parse_json(data)
    except JsonInvalid as error:
        return RowInvalid(str(error))
