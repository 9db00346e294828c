"""Whether two runs sampled the same greedy tokens; if not, whether rounding explains it. No torch.

In bf16 the two best logits are sometimes almost equal. A different order of additions then changes which
token is sampled, and all later tokens differ. The margin at the first difference therefore decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.bench.gpu_check.rows import Value
from server.bench.gpu_check.served import Answer

ALLOWED = 0.25
"""The largest margin that rounding explains, for logits with a standard deviation of 1.

The rounding errors of bf16, added up over the layers, stay below it. The mean margin is below it too, but
several wrong answers have at least one first difference above it.
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Attributes:
    tokens: the number of tokens compared, up to the first difference in each sequence.
    margin: the largest margin at a first difference; 0 = no sequence differs.
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
    """Compare two runs of the same requests. The margins are those of ``theirs``."""
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
