"""Lanes share running slots and prompt tokens. No lane starves, no slot idles, no preemption is useless."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import RoundRobin
from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence
from tests.server.engine.sequences import OpenGate, make_scheduler, make_sequence

ENDLESS = 1000


def _complete(scheduler: Scheduler, chunks: list[Chunk]) -> None:
    scheduler.launched(chunks, async_scheduling=False)
    scheduler.completed(chunks)
    for chunk in chunks:
        scheduler.advance(chunk, 7 if chunk.samples else None)
    scheduler.check_integrity()


def _step(scheduler: Scheduler) -> list[Chunk]:
    chunks = scheduler.schedule()
    _complete(scheduler, chunks)
    return chunks


def _add(
    scheduler: Scheduler, count: int, lane: str | None, prompt: int = 4, new: int = ENDLESS
) -> list[Sequence]:
    sequences = [make_sequence(prompt, adapter=lane, max_tokens=new) for _ in range(count)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def _steps_to_first_token(scheduler: Scheduler, sequence: Sequence, most: int) -> int:
    for steps in range(1, most + 1):
        _step(scheduler)
        if sequence.num_generated:
            return steps
    pytest.fail(f"no token after {most} steps")


def _places(scheduler: Scheduler) -> dict[str, int]:
    return {lane.name: lane.num_running for lane in scheduler.lanes}


def test_streams_of_one_lane_do_not_lock_out_another() -> None:
    scheduler = make_scheduler(blocks=4096, seqs=8, budget=64)
    _add(scheduler, 16, None)
    _step(scheduler)
    (late,) = _add(scheduler, 1, "late")
    assert _steps_to_first_token(scheduler, late, 3) <= 3
    for _ in range(50):
        _step(scheduler)
    assert late.num_generated > 45
    assert scheduler.preemptions == 1


def test_slots_become_shared_equally_and_stay_so() -> None:
    scheduler = make_scheduler(blocks=4096, seqs=8, budget=64)
    _add(scheduler, 16, "first")
    _step(scheduler)
    for lane in ("second", "third"):
        _add(scheduler, 16, lane)
    for _ in range(20):
        _step(scheduler)
    assert sorted(_places(scheduler).values()) == [2, 3, 3]
    before = scheduler.preemptions
    for _ in range(100):
        _step(scheduler)
    assert scheduler.preemptions == before <= 5


def test_a_preempted_request_resumes_from_the_prefix_cache() -> None:
    scheduler = make_scheduler(blocks=4096, seqs=4, budget=64)
    streams = _add(scheduler, 4, None, prompt=16)
    for _ in range(10):
        _step(scheduler)
    _add(scheduler, 1, "short", new=2)
    _step(scheduler)
    _step(scheduler)
    assert streams[-1].table is None, "the youngest request must be preempted"
    computed = 0
    while streams[-1].table is None or streams[-1].num_pending > 1:
        computed += sum(c.length for c in _step(scheduler) if c.sequence is streams[-1])
    assert 0 < computed <= 2 * scheduler.blocks.block_size
    assert scheduler.preemptions == 1


def test_more_lanes_than_slots_take_turns() -> None:
    scheduler = make_scheduler(blocks=4096, seqs=2, budget=64)
    scheduler.fairness = RoundRobin(scheduler.lanes, 32, slice_tokens=10)
    streams = [_add(scheduler, 1, lane)[0] for lane in "abcde"]
    for _ in range(200):
        _step(scheduler)
    generated = [stream.num_generated for stream in streams]
    assert min(generated) > 40
    assert scheduler.preemptions <= sum(generated) / 10


def test_a_long_prompt_does_not_take_the_whole_budget() -> None:
    scheduler = make_scheduler(blocks=4096, budget=64)
    (long,) = _add(scheduler, 1, "long", prompt=2000)
    _step(scheduler)
    assert long.num_computed == 64, "alone, it uses the whole budget"
    (short,) = _add(scheduler, 1, "short", prompt=20)
    assert _steps_to_first_token(scheduler, short, 1) == 1
    _step(scheduler)
    assert long.num_computed == 64 + 44 + 63


def test_long_prompts_advance_equally_by_lane_and_not_by_request() -> None:
    scheduler = make_scheduler(blocks=8192, budget=64)
    many = _add(scheduler, 4, "many", prompt=3000)
    (one,) = _add(scheduler, 1, "one", prompt=3000)
    for _ in range(20):
        _step(scheduler)
    assert abs(sum(s.num_computed for s in many) - one.num_computed) <= 64
    assert sum(s.num_computed for s in many) + one.num_computed == 20 * 64


def test_every_chunk_of_a_prompt_is_charged() -> None:
    """A lane with long prompts and a lane with short prompts get the same number of prompt tokens."""
    scheduler = make_scheduler(blocks=8192, seqs=8, budget=64)
    (long,) = _add(scheduler, 1, "long", prompt=6000)
    shorts = _add(scheduler, 200, "shorts", prompt=30, new=1)
    for _ in range(50):
        _step(scheduler)
    computed = 30 * sum(short.num_generated for short in shorts)
    assert long.num_computed == pytest.approx(computed, rel=0.1)


def test_a_lane_that_holds_all_blocks_does_not_lock_out_another() -> None:
    scheduler = make_scheduler(blocks=32, block_size=4, seqs=16, budget=64)
    _add(scheduler, 16, None, prompt=14, new=80)
    for _ in range(3):
        _step(scheduler)
    (late,) = _add(scheduler, 1, "late", prompt=20)
    assert _steps_to_first_token(scheduler, late, 4) <= 4


def test_a_preempted_request_does_not_block_another_lane() -> None:
    scheduler = make_scheduler(blocks=16, block_size=4, seqs=4, budget=32)
    _add(scheduler, 3, None, prompt=14, new=40)
    while not scheduler.preemptions:
        _step(scheduler)
    (late,) = _add(scheduler, 1, "late", prompt=3, new=2)
    assert _steps_to_first_token(scheduler, late, 4) <= 4


def test_growing_takes_blocks_from_the_lane_with_the_most_slots() -> None:
    scheduler = make_scheduler(blocks=24, block_size=4, seqs=8, budget=64)
    _add(scheduler, 4, "many", prompt=12, new=60)
    (few,) = _add(scheduler, 1, "few", prompt=12, new=60)
    while scheduler.preemptions < 2:
        _step(scheduler)
    assert few.table is not None, "few has the youngest request, but many must be preempted"


def test_short_requests_beside_streams_cause_few_preemptions() -> None:
    """If many short answers end at once, waiting requests of the same lane get their slots."""
    scheduler = make_scheduler(blocks=4096, seqs=16, budget=64)
    _add(scheduler, 40, "streams")
    _add(scheduler, 400, "shorts", prompt=2, new=2)
    for _ in range(60):
        chunks = _step(scheduler)
    assert scheduler.preemptions <= 8
    assert sum(chunk.sequence.params.max_tokens == 2 for chunk in chunks) == 8
    assert len(chunks) == 16


def test_no_slot_is_kept_for_a_lane_whose_adapter_is_cold() -> None:
    scheduler = make_scheduler(blocks=4096, seqs=4, gate=OpenGate(cold={"cold"}))
    _add(scheduler, 8, "warm")
    _add(scheduler, 8, "cold")
    _step(scheduler)
    assert _places(scheduler)["warm"] == 4
    _step(scheduler)
    assert scheduler.preemptions == 0, "no request is preempted for one that cannot start"


def test_no_request_is_preempted_while_a_step_is_in_flight() -> None:
    scheduler = make_scheduler(blocks=4096, seqs=2, budget=64)
    streams = _add(scheduler, 2, None)
    _step(scheduler)
    _add(scheduler, 1, "late")
    in_flight = scheduler.schedule()
    scheduler.launched(in_flight, async_scheduling=True)
    assert scheduler.schedule() == []
    assert all(stream.table is not None for stream in streams)
    scheduler.completed(in_flight)
    for chunk in in_flight:
        scheduler.advance(chunk, 7)
    assert {c.sequence.adapter is not None for c in scheduler.schedule()} == {True, False}


# -- random cases ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    lane: str
    prompt: int
    new: int
    arrives: int


ASKS = st.lists(
    st.builds(Ask, st.sampled_from("abcdef"), st.integers(1, 60), st.integers(1, 60), st.integers(0, 60)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ASKS, st.integers(1, 6), st.integers(6, 40), st.integers(1, 20))
def test_no_lane_starves_no_slot_idles_and_preemptions_are_bounded(
    asks: list[Ask], seqs: int, budget: int, slice_tokens: int
) -> None:
    """There are enough blocks. A lane without a running request waits for a bounded time."""
    scheduler = make_scheduler(blocks=256, seqs=seqs, budget=budget)
    scheduler.fairness = RoundRobin(scheduler.lanes, budget // 2, slice_tokens)
    coming = sorted(asks, key=lambda ask: -ask.arrives)
    starved: dict[str, int] = {}
    generated = steps = 0
    while coming or len(scheduler):
        while coming and coming[-1].arrives <= steps:
            ask = coming.pop()
            _add(scheduler, 1, ask.lane, ask.prompt, ask.new)
        chunks = scheduler.schedule()
        _check_nothing_idles(scheduler, chunks, budget)
        _complete(scheduler, chunks)
        generated += sum(chunk.samples for chunk in chunks)
        steps += 1
        for lane in scheduler.lanes:
            starved[lane.name] = 0 if lane.num_running else starved.get(lane.name, 0) + 1
        assert max(starved.values(), default=0) <= _longest_wait(seqs, budget, slice_tokens)
        assert steps < 10_000
    assert scheduler.preemptions <= len(asks) + generated / slice_tokens


def _check_nothing_idles(scheduler: Scheduler, chunks: list[Chunk], budget: int) -> None:
    used = sum(chunk.length for chunk in chunks)
    assert used <= budget
    if used < budget:
        assert all(chunk.samples for chunk in chunks)
        assert {chunk.sequence for chunk in chunks} == set(scheduler.running)
        assert not scheduler.num_waiting or len(scheduler.running) == scheduler.limits.max_num_seqs


def _longest_wait(seqs: int, budget: int, slice_tokens: int) -> int:
    """The steps until each of six lanes has had its slice, with prompts of up to 120 tokens."""
    prompts = 6 * 120 // max(1, budget - seqs) + 6
    return 6 * (prompts + slice_tokens + 2)


@settings(max_examples=100, deadline=None)
@given(ASKS, st.integers(31, 60), st.integers(1, 6), st.integers(6, 40), st.integers(1, 20))
def test_with_few_blocks_everything_ends(
    asks: list[Ask], blocks: int, seqs: int, budget: int, slice_tokens: int
) -> None:
    scheduler = make_scheduler(blocks=blocks, block_size=4, seqs=seqs, budget=budget)
    scheduler.fairness = RoundRobin(scheduler.lanes, budget // 2, slice_tokens)
    sequences = [_add(scheduler, 1, ask.lane, ask.prompt, ask.new)[0] for ask in asks]
    for _ in range(20_000):
        if not len(scheduler):
            break
        assert _step(scheduler), "a step is empty although no step is in flight"
    assert [s.num_generated for s in sequences] == [ask.new for ask in asks]
    assert scheduler.blocks.num_used == 0
