"""Whether two runs sampled the same greedy tokens, and if not, whether a rounding explains it. No torch.

In bf16 the two best logits are now and then so near to each other that any other order of additions changes
which one is sampled. What follows is then another text. So the margin at the first difference decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.bench.gpu_check.rows import Value
from server.bench.gpu_check.served import Answer

ALLOWED = 0.25
"""Of logits whose standard deviation is 1. What bf16 adds up to over the layers stays below it; the mean
distance of the two best ones does too, but not that of the first difference of several wrong answers."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Attributes:
    tokens: compared, up to the first difference in each sequence.
    margin: the largest at a first difference; 0 = there is none.
    """

    sequences: int
    equal: int
    tokens: int
    margin: float

    @property
    def failed(self) -> str:
        if self.margin <= ALLOWED:
            return ""
        return f"tokens differ where the best logit leads by {self.margin:.2f}, more than bf16 explains"

    @property
    def values(self) -> dict[str, Value]:
        return {
            "sequences": self.sequences,
            "equal": self.equal,
            "tokens compared": self.tokens,
            "margin where they differ": round(self.margin, 4),
        }


def compare(ours: Mapping[str, Answer], theirs: Mapping[str, Answer]) -> Agreement:
    """Of the same requests; the margins are the second one's."""
    assert ours.keys() == theirs.keys()
    tokens, equal, margin = 0, 0, 0.0
    for name, answer in theirs.items():
        first = _first_difference(ours[name].tokens, answer.tokens)
        tokens += len(answer.tokens) if first is None else first + 1
        equal += first is None
        if first is not None:
            margin = max(margin, answer.margins[first])
    return Agreement(len(theirs), equal, tokens, margin)


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    assert len(ours) == len(theirs)
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
