"""What the server does with one field of a body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["served", "no effect", "neutral", "refused"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What the server does with one field.

    Attributes:
        kind: ``served``: the body's model declares the field. ``no effect``: the field is accepted and does
            not change the answer; the model may declare it to check its type. ``neutral``: accepted at values
            that do not change the answer. ``refused``: no value is accepted. Null always counts as absent.
        neutral: the neutral values.
        remedy: what the client can do instead.
    """

    kind: Kind
    neutral: tuple[object, ...] = ()
    remedy: str = "leave it out"

    def accepts(self, value: object) -> bool:
        """Whether a field that the model does not declare may have this value."""
        return self.kind == "no effect" or any(_same(value, each) for each in self.neutral)


Rules = Mapping[str, Rule]
"""The rules of one level of a body, by field name."""

SERVED = Rule("served")
NO_EFFECT = Rule("no effect")


def neutral(*values: object, remedy: str = "") -> Rule:
    """A rule that accepts only these values."""
    shown = " or ".join(json.dumps(value) for value in values)
    return Rule("neutral", values, remedy or f"leave it out, or send {shown}")


def refused(remedy: str = "leave it out") -> Rule:
    """A rule that accepts no value."""
    return Rule("refused", remedy=remedy)


def _same(value: object, other: object) -> bool:
    """Equality as in JSON, where ``true`` is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
