"""The result of an evaluation: figures of the base, the adapter, and the version that it would replace."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Model = Literal["base", "adapter", "replaced"]


@dataclass(frozen=True, slots=True)
class Scores:
    """The figures of one model on the held-out rows.

    Attributes:
        loss: mean negative log-likelihood of the references' learnt tokens, in nats.
        exact_match: share (0 to 1) of short references that the greedy answer equals; None = none is short.
        token_f1: mean word overlap with the short references (0 to 1); None = none is short.
    """

    loss: float
    exact_match: float | None
    token_f1: float | None


@dataclass(frozen=True, slots=True)
class Answers:
    """The greedy answers to one row whose reference is short.

    Attributes:
        line: the line of the row in its file.
        given: the answer of each model.
    """

    line: int
    reference: str
    given: dict[Model, str]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of all models on the same rows, from the same batches.

    Attributes:
        rows, tokens: the number of held-out rows and of their learnt tokens. ``loss`` is the mean over
            the tokens.
        short_rows: the number of rows with a short last reference; ``exact_match`` and ``token_f1`` use them.
        seconds: wall-clock time without loading the base.
        replaced: the version that the adapter would replace; None = there is none.
        answers: one entry for each short row.
    """

    rows: int
    tokens: int
    short_rows: int
    seconds: float
    base: Scores
    adapter: Scores
    replaced: Scores | None
    answers: tuple[Answers, ...]

    def figures(self) -> dict[str, float]:
        """All figures by name: ``loss`` for the adapter, ``base_loss`` for the base, …"""
        models = {"": self.adapter, "base_": self.base, "replaced_": self.replaced}
        flat = {
            f"{prefix}{name}": value
            for prefix, scores in models.items()
            if scores is not None
            for name, value in asdict(scores).items()
        }
        return {name: value for name, value in flat.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """All figures, without the answers."""
        fields = asdict(self)
        del fields["answers"]
        return fields
