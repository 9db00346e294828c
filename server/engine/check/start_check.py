"""The check of a base at every start: what is served equals what transformers computes on the same weights.

Two made-up requests of different lengths run through the model that was chosen, in chunks, beside each other
and decoding, without an adapter and with one. All logits are compared with one uncached forward pass of
transformers for each request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from adapters.artifact import Adapter
from adapters.base import LoadedBase
from adapters.base.implementations import names_in
from adapters.errors import BaseModelError
from adapters.pool.rank_pool import RankPool
from server.engine.check.causes import BESIDE_ADAPTER, WITH_ADAPTER, cause_of
from server.engine.check.deviation import deviations, spread
from server.engine.check.facts import facts_of, versions
from server.engine.check.low_rank import applied, measuring, random_adapter
from server.engine.check.reference import attending_with, uncached_logits
from server.engine.check.sample import (
    Part,
    Request,
    Step,
    chunks_of,
    made_up_prompts,
    mixed_steps,
    requests_for,
)
from server.engine.check.verdicts import Verdict, Verdicts
from server.engine.model import StepModel
from server.engine.model.probe import Probe
from server.engine.model.supported import naming

log = logging.getLogger("manylora.engine")

BOUND = 0.15
"""Largest deviation that rounding explains (``deviation.py``).

Measured on tiny random models of 20 families and on SmolLM2-135M: right ones deviate by 0.005 to 0.1, and
transformers' own sdpa and eager attention by 0.006 to 0.04 from each other; wrong ones by 0.4 and more.
"""

_SPREAD = 3.0
"""A base may deviate by this multiple of what transformers' two attentions differ by, up to twice the bound.

So a base that magnifies rounding is not refused for it.
"""


class StartCheck:
    """The check of one base. Call ``prepare``, build the model, allocate its pages, then call ``run``.

    Args:
        home: the folder of all state.
        found: what ``probe`` returned for ``base``.
        longest: most tokens of a sequence.
        options: what else decides which kernels run; for the verdict's facts.
    """

    def __init__(self, home: Path, base: LoadedBase, found: Probe, longest: int, options: str) -> None:
        self._model, self._sites, self._found = base.model, base.layout.sites, found
        self._config: Any = base.model.config
        self._longest = longest
        self._verdicts = Verdicts(home, base.prepared.digest)
        self._facts = facts_of(base.model.device, options)
        self._prompts: list[tuple[int, ...]] = []
        self._expected: list[Tensor] = []
        self._adapter: Adapter | None = None
        self._expected_with_adapter: Tensor | None = None

    def prepare(self, pool: RankPool) -> None:
        """Compute what is expected, unless a verdict is known. The modules must still be transformers' own.

        Raises:
            BaseModelError: transformers cannot compute it.
        """
        if not self._verdicts.find(self._facts):
            self._expect(pool)

    def run(
        self, model: StepModel, pool: RankPool, max_tokens: int, num_blocks: int, block_size: int
    ) -> None:
        """Compare ``model``, whose pages are allocated and which no sequence uses yet.

        Args:
            pool: its rank rows, all of them free.
            max_tokens: most tokens of a step.

        Raises:
            BaseModelError: the model deviates; names the architecture, the figure and the likely cause.
        """
        if any(verdict.model == model.name for verdict in self._verdicts.find(self._facts)):
            return
        with naming(self._config, "the check at the start"):
            if not self._expected:  # the facts are those of a verdict, but another model was built
                _use_no_adapter(model)
                self._expect(pool)
            requests = requests_for(self._prompts, num_blocks, block_size)
            worst = max(
                self._check_base(model, requests, max_tokens),
                self._check_adapter(model, pool, requests, max_tokens),
            )
        log.info("checked against transformers: the logits deviate by %.3f, at most %.2f", worst, BOUND)
        self._verdicts.add(Verdict(self._facts, model.name, worst))

    # -- what is expected -------------------------------------------------------------------------

    def _expect(self, pool: RankPool) -> None:
        self._prompts = made_up_prompts(self._config, self._found.specs.values(), self._longest)
        own = self._found.own_attention
        with naming(self._config, "transformers' own forward pass"), attending_with(self._model, own):
            with measuring(self._model, self._sites) as gains:
                self._expected = [uncached_logits(self._model, prompt) for prompt in self._prompts]
            if self._sites:
                self._adapter = random_adapter(self._sites, gains, pool.max_rank)
                with applied(self._model, self._adapter):
                    self._expected_with_adapter = uncached_logits(self._model, self._prompts[0])

    def _allowed(self, model: StepModel) -> float:
        """The largest deviation that rounding explains for this base."""
        own = self._found.own_attention
        _use_no_adapter(model)
        try:
            with attending_with(self._model, "eager" if "sdpa" in names_in(own) else "sdpa"):
                other = [uncached_logits(self._model, prompt) for prompt in self._prompts]
        except (ValueError, RuntimeError, TypeError):  # it has one implementation only
            return BOUND
        return min(max(BOUND, _SPREAD * spread(other, self._expected)), 2 * BOUND)

    # -- comparisons ------------------------------------------------------------------------------

    def _check_base(self, model: StepModel, requests: Sequence[Request], max_tokens: int) -> float:
        steps = mixed_steps(requests, max_tokens)
        worst = max(deviations(model, steps, requests, self._expected).values())
        if worst > BOUND and worst > (allowed := self._allowed(model)):

            def is_right(steps: Sequence[Step]) -> bool:
                return max(deviations(model, steps, requests, self._expected).values()) <= allowed

            self._refuse(worst, allowed, cause_of(is_right, requests, max_tokens))
        return worst

    def _check_adapter(
        self, model: StepModel, pool: RankPool, requests: Sequence[Request], max_tokens: int
    ) -> float:
        if self._adapter is None or self._expected_with_adapter is None:
            return 0.0
        expected = [self._expected_with_adapter, *self._expected[1:]]
        with _resident(pool, self._adapter) as slot:
            mixed = [replace(requests[0], slot=slot), *requests[1:]]
            found = deviations(model, mixed_steps(mixed, max_tokens), mixed, expected)
        worst = max(found.values())
        if worst > BOUND and worst > (allowed := self._allowed(model)):
            self._refuse(worst, allowed, WITH_ADAPTER if found[0] > allowed else BESIDE_ADAPTER)
        return worst

    def _refuse(self, worst: float, allowed: float, cause: str) -> NoReturn:
        raise BaseModelError(
            f"here its logits differ from transformers' own by {worst:.2f} standard deviations, and rounding "
            f"explains {allowed:.2f} at most. Probably the cause is this: {cause}. Give --base another model."
        )


@contextmanager
def _resident(pool: RankPool, adapter: Adapter) -> Iterator[int]:
    """The slot of ``adapter``, which is in ``pool`` meanwhile."""
    slot = pool.reserve(adapter.info.ranks)
    assert slot is not None, "the pool is empty at the start"
    try:
        pool.write(slot, adapter)
        yield slot
    finally:
        pool.free(slot)


def _use_no_adapter(model: StepModel) -> None:
    """Run a step of the base, after which the model's wrapped linears add nothing."""
    model(chunks_of([Part(0, 0, 1)], [Request((1,), (0,))]))


def has_passed(home: Path, digest: str) -> bool:
    """Whether the base passed on any device and with any options, with the present versions."""
    return any(versions().items() <= verdict.facts.items() for verdict in Verdicts(home, digest).all())
