"""Writes the tenants' data sets from their pools of phrasings, identically on every machine.

::

    python -m adapters.samples.generate

For each answer a pool (``pools/TASK.toml``) has phrasings to train on and phrasings that are held out. Each
phrasing is filled in a few times with random words for its slots. ``#`` in them is a random digit.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapters.samples.task import FOLDER, Conversation

Split = Literal["train", "heldout"]

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Pool:
    """One tenant's task.

    Attributes:
        system: the system message of every row.
        openers: words that may begin a question; one is drawn at random.
        copies: how often each phrasing is filled in.
        slots: the words for each slot, by name.
        phrasings: by split, pairs of a question and its answer, both with ``{slot}``s.
    """

    name: str
    system: str
    openers: list[str]
    copies: int
    slots: dict[str, list[str]]
    phrasings: dict[Split, list[tuple[str, str]]]


def read_pool(task: str) -> Pool:
    values: dict[str, Any] = tomllib.loads((FOLDER / "pools" / f"{task}.toml").read_text(encoding="utf-8"))
    phrasings: dict[Split, list[tuple[str, str]]] = {
        split: [(question, entry["answer"]) for entry in values["answers"] for question in entry[split]]
        for split in ("train", "heldout")
    }
    openers = values.get("openers", [""])
    return Pool(task, values["system"], openers, values["copies"], values["slots"], phrasings)


def rows(pool: Pool, split: Split) -> list[Conversation]:
    """The conversations of a split, shuffled and without duplicates."""
    draw = random.Random(f"{pool.name} {split}")
    pairs = [pair for pair in pool.phrasings[split] for _ in range(pool.copies)]
    filled = list(dict.fromkeys(_fill(pool, question, answer, draw) for question, answer in pairs))
    draw.shuffle(filled)
    return [_conversation(pool.system, question, answer) for question, answer in filled]


def _fill(pool: Pool, question: str, answer: str, draw: random.Random) -> tuple[str, str]:
    """Fill in a phrasing. A slot has the same value in question and answer."""
    text = draw.choice(pool.openers) + question
    names = dict.fromkeys(_SLOT.findall(text + answer))
    words = {name: _word(draw.choice(pool.slots[name]), draw) for name in names}
    return _with_capital(_SLOT.sub(lambda slot: words[slot[1]], text)), _SLOT.sub(
        lambda slot: words[slot[1]], answer
    )


def _word(pattern: str, draw: random.Random) -> str:
    return re.sub("#", lambda _: str(draw.randrange(10)), pattern)


def _with_capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _conversation(system: str, question: str, answer: str) -> Conversation:
    contents = {"system": system, "user": question, "assistant": answer}
    return [{"role": role, "content": content} for role, content in contents.items()]


def files(task: str) -> Iterator[tuple[Path, str]]:
    """The two data files of a task and their contents."""
    pool = read_pool(task)
    names: dict[Split, str] = {"train": task, "heldout": f"{task}-heldout"}
    for split, name in names.items():
        lines = [json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows(pool, split)]
        yield FOLDER / "data" / f"{name}.jsonl", "".join(lines)


def tasks() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "pools").glob("*.toml"))


def main() -> None:
    for task in tasks():
        for path, text in files(task):
            path.write_text(text, encoding="utf-8")
            print(f"{path.name}: {text.count(chr(10))} rows")


if __name__ == "__main__":
    main()
