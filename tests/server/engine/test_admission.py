"""Scheduler, gate and residency together. A waiting request gets its adapter, in the right version."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from adapters.artifact.chat_config import ChatConfig
from adapters.errors import AdapterChanged, AdapterError, AdapterInvalid, AdapterNotFound
from adapters.registry import Version
from server.engine.admission import ResidencyGate
from server.engine.kv_cache import BlockManager
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Sequence
from tests.server.engine.sequences import make_sequence
from tests.support.residency import World, make_version

STEP = 0.025
"""Seconds; so an answer of 100 tokens takes 2.5."""


@dataclass
class Names:
    """A fake registry: the current version of each name, and the number of requests that use each version."""

    current: dict[str, Version] = field(default_factory=dict)
    uses: dict[Version, int] = field(default_factory=dict)

    def resolve(self, name: str) -> Version:
        if name not in self.current:
            raise AdapterNotFound(f"There is no adapter {name!r}.")
        return self.current[name]

    def acquire(self, version: Version) -> None:
        self.uses[version] = self.uses.get(version, 0) + 1

    def release(self, version: Version) -> None:
        self.uses[version] -= 1


class Serving:
    """A scheduler with a real residency, two running slots, and room for two adapters of rank 4."""

    def __init__(self, seqs: int = 2, rows: int = 8) -> None:
        self.world, self.names = World(rows), Names()
        self.gate = ResidencyGate(self.world.residency, self.names, lambda: self.world.now)  # type: ignore[arg-type]
        limits = SchedulerLimits(seqs, max_num_batched_tokens=64, max_model_len=4096)
        self.scheduler = Scheduler(limits, BlockManager(1024, 4), self.gate)

    def ask(self, version: Version | None, new: int = 100) -> Sequence:
        sequence = make_sequence(4, adapter=version, max_tokens=new)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[Sequence, AdapterError]]:
        chunks = self.scheduler.schedule()
        self.scheduler.launched(chunks, async_scheduling=False)
        self.scheduler.completed(chunks)
        for chunk in chunks:
            self.scheduler.advance(chunk, 7 if chunk.samples else None)
        self.scheduler.check_integrity()
        self.world.now += STEP
        self.world.settled()
        self.world.residency.check_integrity()
        return self.gate.take_failures()


def test_a_cold_adapter_is_served_while_hot_ones_always_have_requests() -> None:
    serving = Serving()
    hot = [make_version("hot1"), make_version("hot2")]
    for i in range(200):
        if serving.scheduler.num_waiting < 4:
            serving.ask(hot[i % 2])
        serving.step()
    cold = serving.ask(make_version("cold"))
    for i in range(250):
        while serving.scheduler.num_waiting < 4:
            serving.ask(hot[i % 2])
        serving.step()
    assert cold.num_generated == 100, "it must wait at most for one answer of 2.5 s"


def test_an_adapter_is_loaded_before_a_slot_is_free() -> None:
    serving = Serving(seqs=1)
    serving.ask(None)
    serving.step()
    for name in ("next", "after"):
        serving.ask(make_version(name))
    for _ in range(3):
        serving.step()
    assert [serving.world.residency.tier(f"digest-{name}") for name in ("next", "after")] == ["device"] * 2


def test_an_adapter_that_was_loaded_early_stays_until_its_request_runs() -> None:
    serving = Serving(seqs=1, rows=4)
    serving.ask(None, new=100)
    serving.step()
    waiting = serving.ask(make_version("a"))
    other = serving.ask(make_version("b"))
    for _ in range(102):
        serving.step()
    assert waiting.num_generated > 0
    assert serving.world.reads == ["a", "b"], "each adapter must be read once"
    serving.scheduler.remove(other)


def test_removing_a_request_ends_the_draining_for_it() -> None:
    serving = Serving()
    hot = make_version("hot", rank=8)
    serving.ask(hot, new=20)
    serving.step()
    serving.step()
    cold = serving.ask(make_version("cold"))
    serving.step()
    again = serving.ask(hot)
    serving.step()
    assert not again.num_generated, "hot must drain, so it takes no new request"
    serving.scheduler.remove(cold)
    serving.step()
    assert again.num_generated


def test_a_loading_failure_is_reported_before_a_slot_is_free() -> None:
    serving = Serving(seqs=1)
    serving.ask(None)
    serving.step()
    serving.world.broken["bad"] = AdapterInvalid("it is broken")
    bad = serving.ask(make_version("bad"))
    serving.step()
    assert [sequence for sequence, _ in serving.step()] == [bad]


# -- one version a request ------------------------------------------------------------------------


def _siblings(serving: Serving, version: Version) -> list[Sequence]:
    first, second = make_sequence(4, adapter=version), make_sequence(4, adapter=version)
    second.shared = first.shared
    serving.names.acquire(version)
    return [first, second]


def test_all_answers_of_a_request_move_to_the_new_version_together() -> None:
    serving = Serving()
    old = make_version("a")
    serving.names.current["a"] = new = make_version("a")
    serving.world.broken["a"] = AdapterChanged("it is another")
    first, second = _siblings(serving, old)
    serving.scheduler.add(first)
    serving.step()
    assert not serving.step()
    assert first.adapter is second.adapter is new
    assert serving.names.uses == {old: 0, new: 1}
    del serving.world.broken["a"]
    serving.step()
    serving.step()
    assert first.num_generated


def test_a_prompt_is_not_answered_by_a_version_with_another_chat_template() -> None:
    serving = Serving()
    old, new = make_version("a"), make_version("a")
    chat_config = ChatConfig(template="{{ messages }}", tokens=(), eos_ids=(), added=())
    serving.names.current["a"] = replace(new, info=replace(new.info, chat_config=chat_config))
    serving.world.broken["a"] = AdapterChanged("it is another")
    asked = serving.ask(old)
    serving.step()
    (failed, error), *_ = serving.step()
    assert failed is asked
    assert isinstance(error, AdapterChanged)
    assert asked.adapter is old


def test_an_answer_keeps_the_version_with_which_its_sibling_began() -> None:
    serving = Serving()
    old = make_version("a")
    first, second = _siblings(serving, old)
    serving.scheduler.add(first)
    while not first.num_generated:
        serving.step()
    serving.scheduler.remove(first)
    serving.world.residency.forget(old.digest)
    serving.names.current["a"] = make_version("a")
    serving.world.broken["a"] = AdapterChanged("it is another")
    serving.scheduler.add(second)
    serving.step()
    with pytest.raises(AdapterChanged):
        raise serving.step()[0][1]
    assert second.adapter is old
