from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.scheduler import Scheduler
from server.engine.sequence import Chunk, Sequence
from tests.server.engine.sequences import OpenGate, make_scheduler, make_sequence


def _step(scheduler: Scheduler, token: int = 7) -> list[Chunk]:
    chunks = scheduler.schedule()
    scheduler.launched(chunks, async_scheduling=False)
    scheduler.completed(chunks)
    for chunk in chunks:
        scheduler.advance(chunk, token if chunk.samples else None)
    return chunks


def _lengths(chunks: list[Chunk]) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.length for chunk in chunks}


def test_a_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    scheduler = make_scheduler(budget=8)
    short, long = make_sequence(3), make_sequence(18)
    scheduler.add(short)
    scheduler.add(long)
    assert _lengths(_step(scheduler)) == {short.request_id: 3, long.request_id: 5}
    assert _lengths(_step(scheduler)) == {short.request_id: 1, long.request_id: 7}
    assert _lengths(_step(scheduler)) == {short.request_id: 1, long.request_id: 6}
    assert long.num_generated == 1
    assert _lengths(_step(scheduler)) == {short.request_id: 1, long.request_id: 1}


def test_chunks_of_one_adapter_are_adjacent() -> None:
    gate = OpenGate()
    scheduler = make_scheduler(gate=gate)
    sequences = [make_sequence(3, adapter=name) for name in ("x", "y", "x", "y")]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.schedule()
    for sequence in sequences:  # the pool gives each adapter a slot
        sequence.slot = 0 if sequence.adapter and sequence.adapter.name == "x" else 1
        sequence.num_computed = 3
        sequence.tokens.append(9)
    assert [chunk.sequence.slot for chunk in scheduler.schedule()] == [0, 0, 1, 1]


def test_the_youngest_is_preempted_and_resumes() -> None:
    scheduler = make_scheduler(blocks=6, block_size=4)
    old, young = make_sequence(8), make_sequence(7)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.preemptions == 0:
        _step(scheduler)
        scheduler.check_integrity()
    assert scheduler.lanes.of(young).preempted == [young]
    assert young.table is None
    generated = young.tokens[7:]
    scheduler.remove(old)
    _step(scheduler)
    assert scheduler.running == [young]
    assert young.tokens[7:] == [*generated, 7]


def test_no_new_request_is_admitted_before_preempted_ones() -> None:
    scheduler = make_scheduler(blocks=6, block_size=4)
    scheduler.add(make_sequence(8))
    scheduler.add(make_sequence(7))
    while scheduler.preemptions == 0:
        _step(scheduler)
    newcomer = make_sequence(1)
    scheduler.add(newcomer)
    _step(scheduler)
    assert newcomer not in scheduler.running


def test_a_cold_adapter_does_not_block_others() -> None:
    gate = OpenGate(cold={"cold"})
    scheduler = make_scheduler(gate=gate)
    cold, warm, base = make_sequence(3, adapter="cold"), make_sequence(3, adapter="warm"), make_sequence(3)
    for sequence in (cold, warm, base):
        scheduler.add(sequence)
    assert set(_lengths(_step(scheduler))) == {warm.request_id, base.request_id}
    gate.cold.clear()
    assert cold.request_id in _lengths(_step(scheduler))


def test_a_flood_for_one_adapter_does_not_starve_another() -> None:
    scheduler = make_scheduler(blocks=512, seqs=4, budget=512)
    for _ in range(50):
        scheduler.add(make_sequence(300, adapter="flood", max_tokens=1))
    late = make_sequence(4, adapter="late")
    scheduler.add(late)
    for _ in range(4):
        _step(scheduler)
    assert late.num_generated > 0


def test_removal_frees_everything_in_every_state() -> None:
    gate = OpenGate()
    scheduler = make_scheduler(seqs=1, gate=gate)
    running, waiting = make_sequence(5), make_sequence(5)
    scheduler.add(running)
    scheduler.add(waiting)
    _step(scheduler)
    assert scheduler.remove(waiting)
    assert scheduler.remove(running)
    assert not scheduler.remove(running)
    assert gate.pins == 0
    assert scheduler.blocks.num_used == 0
    assert len(scheduler) == 0


def test_finish_reasons() -> None:
    stop, length, ignoring = (
        make_sequence(3),
        make_sequence(3, max_tokens=2),
        make_sequence(3, ignore_eos=True),
    )
    early = make_sequence(3, min_tokens=3, stop_token_ids=(7,))
    for sequence, token in ((stop, 2), (length, 2), (ignoring, 2), (early, 7)):
        sequence.tokens.append(token)
    assert stop.finish_reason(4, 100) == "stop"
    assert ignoring.finish_reason(4, 100) is None
    length.tokens.append(5)
    assert length.finish_reason(5, 100) == "length"
    assert early.finish_reason(4, 100) is None
    assert ignoring.finish_reason(4, 4) == "length"


class _Run:
    """Runs a scheduler to the end and checks its invariants in every step."""

    def __init__(self, scheduler: Scheduler, sequences: list[Sequence]) -> None:
        self.scheduler = scheduler
        self.sequences = sequences
        self._stalled = 0

    def to_the_end(self) -> None:
        for _ in range(3000):
            if len(self.scheduler) == 0:
                return
            self._checked_step()
        raise AssertionError("the scheduler does not finish")

    def _checked_step(self) -> None:
        limits = self.scheduler.limits
        placed = [s for s in self.sequences if s.table is not None]
        oldest = min(placed, key=lambda s: s.arrival, default=None)
        before = (oldest.num_computed, len(oldest.tokens)) if oldest else (0, 0)
        chunks = _step(self.scheduler)
        assert 0 < sum(chunk.length for chunk in chunks) <= limits.max_num_batched_tokens
        assert len(self.scheduler.running) <= limits.max_num_seqs
        self.scheduler.check_integrity()
        if oldest is None or oldest.num_generated >= oldest.params.max_tokens:
            return
        moved = (oldest.num_computed, len(oldest.tokens)) > before
        self._stalled = 0 if moved else self._stalled + 1
        assert self._stalled <= limits.max_num_batched_tokens, "the oldest request does not advance"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 10), st.sampled_from(["a", "b", None])), max_size=12
    ),
    st.integers(11, 24),
    st.integers(4, 20),
    st.integers(1, 4),
)
def test_all_requests_finish(
    requests: list[tuple[int, int, str | None]], blocks: int, budget: int, seqs: int
) -> None:
    scheduler = make_scheduler(blocks=blocks, block_size=4, seqs=seqs, budget=budget)
    sequences = [make_sequence(n, adapter=adapter, max_tokens=new) for n, new, adapter in requests]
    for sequence in sequences:
        scheduler.add(sequence)
    _Run(scheduler, sequences).to_the_end()
    assert all(s.num_generated == s.params.max_tokens for s in sequences)
    assert scheduler.blocks.num_used == 0
