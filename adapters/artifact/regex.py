"""Matches regular expressions of an adapter's config with a time limit.

A pattern in a config is untrusted data. ``re`` can take exponential time while it holds the interpreter lock,
so one folder could stop the whole server. Patterns with an operator that can backtrack, and very many
patterns, run in a child interpreter that is killed after ``TIMEOUT`` seconds. The child runs this file too,
so the file imports only the standard library.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

TIMEOUT = 2.0
"""Seconds that all patterns of one config may take in total."""

MAX_PATTERNS = 4096
MAX_MATCHES = 2**20
"""Pairs of a pattern and a name that are tried in this interpreter. The child does larger jobs."""
_PLAIN = re.compile(r"[\w.^$\\-]*")

Hits = dict[str, str | None]
"""Name that matched → the text of its group ``idx``, if there is one."""


class Pattern(NamedTuple):
    """``core`` is the part from the config, ``text`` the whole pattern.

    ``full`` asks for ``re.fullmatch``.
    """

    core: str
    text: str
    full: bool


class BudgetExceeded(Exception):
    """The time that ``SharedBudget`` allowed was too short. The patterns may still be fine."""


class SharedBudget:
    """A time budget below ``TIMEOUT`` that the patterns of several configs share. Thread-safe."""

    def __init__(self, total: float, each: float) -> None:
        """Seconds in total, and for one call."""
        self._left = total
        self._each = each
        self._lock = threading.Lock()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, in this thread, ``match_names`` may raise BudgetExceeded."""
        token = _shared_budget.set(self)
        try:
            yield
        finally:
            _shared_budget.reset(token)

    @contextmanager
    def taken(self) -> Iterator[float]:
        """Seconds for one call; unused time is returned. Raises BudgetExceeded if nothing is left."""
        with self._lock:
            seconds = min(self._each, self._left)
            self._left -= seconds
        if seconds <= 0:
            raise BudgetExceeded
        began = time.monotonic()
        try:
            yield seconds
        finally:
            with self._lock:
                self._left += max(0.0, seconds - (time.monotonic() - began))


@contextmanager
def time_for(most: float) -> Iterator[float]:
    """Seconds for other slow work on a folder, taken from this thread's ``SharedBudget``.

    Raises BudgetExceeded if nothing is left.
    """
    budget = _shared_budget.get()
    if budget is None:
        yield most
        return
    with budget.taken() as seconds:
        yield min(seconds, most)


@dataclass(slots=True)
class _Budget:
    seconds: float


_shared_budget: ContextVar[SharedBudget | None] = ContextVar("shared_budget", default=None)
_config_budget: ContextVar[_Budget | None] = ContextVar("config_budget", default=None)


@contextmanager
def config_budget() -> Iterator[None]:
    """Inside, all calls of ``match_names`` in this thread share one ``TIMEOUT``.

    They belong to one config.
    """
    token = _config_budget.set(_Budget(TIMEOUT))
    try:
        yield
    finally:
        _config_budget.reset(token)


@lru_cache(maxsize=256)
def match_names(patterns: tuple[Pattern, ...], names: tuple[str, ...]) -> tuple[Hits, ...]:
    """The names that each pattern matches. Raises ValueError: not a regex, too many, or too slow."""
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"there are {len(patterns)} patterns; at most {MAX_PATTERNS} are allowed")
    many = len(patterns) * len(names) > MAX_MATCHES
    slow = [pattern for pattern in patterns if many or not _PLAIN.fullmatch(pattern.core)]
    answers = dict(zip(slow, _in_child(slow, names), strict=True)) if slow else {}
    return tuple(answers[p] if p in answers else _hits(p.text, p.full, names) for p in patterns)


def _hits(text: str, full: bool, names: Sequence[str]) -> Hits:
    try:
        compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{text!r:.200} is not a regular expression ({error})") from None
    match = compiled.fullmatch if full else compiled.match
    return {name: found.groupdict().get("idx") for name in names if (found := match(name))}


def _in_child(patterns: Sequence[Pattern], names: Sequence[str]) -> list[Hits]:
    """Raises like ``match_names``."""
    budget = _shared_budget.get()
    if budget is None:
        return _in_budget(patterns, names, _config_budget.get() or _Budget(TIMEOUT))
    with budget.taken() as seconds:
        try:
            return _asked(patterns, names, seconds)
        except subprocess.TimeoutExpired:
            raise BudgetExceeded from None


def _in_budget(patterns: Sequence[Pattern], names: Sequence[str], budget: _Budget) -> list[Hits]:
    began = time.monotonic()
    try:
        return _asked(patterns, names, budget.seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the patterns of the config take longer than {TIMEOUT:g} seconds to match; simplify them"
        ) from None
    finally:
        budget.seconds = max(0.0, budget.seconds - (time.monotonic() - began))


def _asked(patterns: Sequence[Pattern], names: Sequence[str], timeout: float) -> list[Hits]:
    question = json.dumps({"patterns": [(p.text, p.full) for p in patterns], "names": names})
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", __file__],
            input=question.encode(),
            capture_output=True,
            timeout=timeout,
            check=True,
        )
    except (subprocess.CalledProcessError, OSError) as error:
        raise ValueError(f"its patterns could not be matched ({error})") from None
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return list(answer["hits"])


def _child() -> None:
    question = json.load(sys.stdin)
    try:
        json.dump({"hits": [_hits(t, f, question["names"]) for t, f in question["patterns"]]}, sys.stdout)
    except ValueError as error:
        json.dump({"error": str(error)}, sys.stdout)


if __name__ == "__main__":
    _child()
