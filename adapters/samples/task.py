"""A sample task: its rows, and a check that an answer has its style. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

Conversation = list[dict[str, str]]
"""OpenAI chat messages: ``role`` and ``content``."""

FOLDER = Path(__file__).parent
TOPICS = (
    "advice",
    "animals",
    "arts",
    "chat",
    "food",
    "geography",
    "history",
    "language",
    "math",
    "science",
    "technology",
)
_PIRATE = re.compile(r"\b(arr+|ahoy|aye|nay|avast|matey|me heart(y|ies)|ye|yer)\b", re.IGNORECASE)


def read_rows(path: Path) -> list[Conversation]:
    """The conversations of a JSONL file with one ``{"messages": [...]}`` on each line."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def training_rows(task: str) -> list[Conversation]:
    return read_rows(FOLDER / "data" / f"{task}.jsonl")


def heldout_rows(task: str) -> list[Conversation]:
    """Rows whose questions do not occur in the training rows."""
    return read_rows(FOLDER / "data" / f"{task}-heldout.jsonl")


def is_pirate(text: str) -> bool:
    return _PIRATE.search(text) is not None


def is_json_answer(text: str) -> bool:
    """Whether the answer is exactly one line ``{"answer": <text>, "topic": <one of TOPICS>}``."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or set(value) != {"answer", "topic"} or "\n" in text:
        return False
    return isinstance(value["answer"], str) and value["topic"] in TOPICS


HAS_STYLE: dict[str, Callable[[str], bool]] = {"pirate": is_pirate, "json-answers": is_json_answer}
