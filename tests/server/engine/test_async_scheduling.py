"""Asynchronous scheduling gives the same tokens. It frees nothing that a step in flight still reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import AdapterInvalid
from server.engine.engine import Engine, Output
from server.engine.interface import GenerationRequest
from server.engine.sampling import truncation
from server.engine.sampling_params import SamplingParams
from server.errors import OutOfMemory, RequestFailed
from tests.server.engine.fake_device import BLOCK, CountingRegistry, LateDevice, late_engine
from tests.server.engine.sequences import make_version

STEM = (5, 6, 7, 8, 9, 10, 11, 5, 6)


@dataclass
class Ask:
    """A request, the step at which it arrives, and when its client disconnects or ends its first answer."""

    prompt: tuple[int, ...] = STEM
    adapter: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    arrives: int = 0
    leaves: int | None = None
    stops: int | None = None

    def request(self, request_id: str) -> GenerationRequest:
        sampling = SamplingParams(**({"max_tokens": 6, "temperature": 0.0, "seed": 1} | self.params))
        return GenerationRequest(request_id, self.prompt, self.adapter, sampling)


class Run:
    """Adds requests to an engine and runs it to the end. Checks its integrity after each step."""

    def __init__(
        self, engine: Engine, registry: CountingRegistry, asks: list[Ask], names: list[str] | None = None
    ) -> None:
        self.engine, self.registry = engine, registry
        self.asks = dict(zip(names or [str(i) for i in range(len(asks))], asks, strict=True))
        self.outputs: dict[tuple[str, int], list[Output]] = {}
        self.errors: list[Output] = []
        self.steps = 0

    def step(self) -> None:
        self._events()
        for output in self.engine.step():
            self._hear(output)
        self.engine.scheduler.check_integrity()
        self.steps += 1

    def to_the_end(self) -> Run:
        last = max(ask.arrives for ask in self.asks.values())
        while self.engine.busy or self.steps <= last:
            assert self.steps < 2000, "the engine does not finish"
            self.step()
        self.engine.check_idle()
        assert self.engine.scheduler.blocks.num_used == 0
        assert self.registry.users == 0
        assert self.engine._gate.pins == [0, 0]  # type: ignore[attr-defined]
        return self

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [output.token for output in self.outputs.get((request_id, index), [])]

    def _hear(self, output: Output) -> None:
        if output.error is not None:
            self.errors.append(output)
        else:
            self.outputs.setdefault((output.request_id, output.index), []).append(output)

    def _events(self) -> None:
        for name, ask in self.asks.items():
            if ask.arrives == self.steps:
                version = make_version(ask.adapter) if ask.adapter else None
                if version is not None:
                    self.registry.acquire(version)
                self.engine.add(ask.request(name), version, seed=ask.params.get("seed", 1))
            if ask.leaves is not None and ask.arrives + ask.leaves == self.steps:
                self.engine.abort(name)
            if ask.stops is not None and ask.arrives + ask.stops == self.steps:
                self.engine.abort_answer(name, 0)


def _run(asks: list[Ask], async_scheduling: bool = True, **sizes: Any) -> tuple[Run, LateDevice]:
    engine, device, registry = late_engine(async_scheduling, **sizes)
    return Run(engine, registry, asks).to_the_end(), device


def _alone(ask: Ask, name: str) -> Run:
    """The same request alone, without asynchronous scheduling."""
    engine, _, registry = late_engine(async_scheduling=False)
    quiet = Ask(ask.prompt, ask.adapter, ask.params)
    return Run(engine, registry, [quiet], [name]).to_the_end()


def test_the_next_step_is_launched_before_the_last_is_read() -> None:
    run, device = _run([Ask(params={"max_tokens": 3})])
    step = ["launch", "sample"]
    assert device.history == [*step, *step, "read", *step, "read", "read"]
    assert len(run.tokens("0")) == 3


def test_no_step_waits_for_tokens_on_the_device() -> None:
    """Penalties, log-probabilities and minimum lengths get one token in each step, as without it."""
    params: list[dict[str, Any]] = [
        {"repetition_penalty": 1.5}, {"frequency_penalty": 0.5, "presence_penalty": 0.2}, {"min_tokens": 9},
        {"logprobs": 3, "temperature": 1.0}, {"logit_bias": {3: 1.0}},
    ]  # fmt: skip
    asks = [Ask(params={"max_tokens": 10, "ignore_eos": True} | one) for one in params]
    run, _ = _run(asks, seqs=8, budget=64)
    assert run.steps == 11
    for name, ask in run.asks.items():
        quiet = _alone(ask, name)
        assert run.outputs[name, 0][-1].logprobs == quiet.outputs[name, 0][-1].logprobs
        assert run.tokens(name) == quiet.tokens(name)


def test_a_request_that_will_end_is_not_computed_further() -> None:
    _, device = _run([Ask(params={"max_tokens": 1})])
    assert device.history == ["launch", "sample", "read"]


def test_a_revised_token_repeats_only_its_own_rows_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flat = Ask(
        params={"logprobs": 1, "temperature": 5.0, "top_p": 0.99, "max_tokens": 20, "ignore_eos": True}
    )
    other = Ask(params={"max_tokens": 20, "ignore_eos": True})
    quiet = _alone(flat, "0").tokens("0")
    monkeypatch.setattr(truncation, "_HEAD", 2)
    run, _ = _run([flat, other])
    assert run.tokens("0") == quiet
    assert run.tokens("1") == _alone(other, "1").tokens("1")
    assert run.steps > 22, "no sample was revised, so the test proves nothing"


def test_an_ended_sequence_keeps_its_adapter_until_the_step_in_flight_has_completed() -> None:
    engine, _, registry = late_engine(async_scheduling=True)
    registry.users = 1
    engine.add(Ask(adapter="a").request("0"), make_version("a"), seed=1)
    engine.step()
    engine.step()
    engine.abort("0")
    assert engine.take_ended() == ["0"]
    assert engine.busy
    assert engine.scheduler.blocks.num_used > 0
    assert engine._gate.pins == [1, 0]  # type: ignore[attr-defined]
    engine.step()
    engine.check_idle()
    assert engine._gate.pins == [0, 0]  # type: ignore[attr-defined]


def test_the_prefix_cache_has_generated_tokens() -> None:
    """The hash of a block needs its tokens, so blocks get it after the tokens are read."""
    first = Ask(params={"max_tokens": 12, "ignore_eos": True})
    said = tuple(_alone(first, "0").tokens("0"))
    again = Ask(STEM + said, None, {"max_tokens": 1}, arrives=20)
    run, _ = _run([first, again])
    assert run.outputs["1", 0][0].cached == (len(STEM + said) - 1) // BLOCK * BLOCK


def test_a_preemption_reads_the_step_in_flight_first() -> None:
    asks = [Ask(STEM, None, {"max_tokens": 12, "ignore_eos": True}), Ask(STEM[:5], None, {"max_tokens": 12})]
    run, _ = _run(asks, blocks=6)
    assert run.engine.scheduler.preemptions > 0
    for name, ask in run.asks.items():
        assert run.tokens(name) == _alone(ask, name).tokens(name)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_lanes_that_take_turns_get_the_same_tokens(async_scheduling: bool) -> None:
    params = {"max_tokens": 20, "ignore_eos": True}
    asks = [Ask(STEM[i:], adapter, params) for i, adapter in enumerate(("a", None, "b", "a", None))]
    run, _ = _run(asks, async_scheduling, seqs=1, slice_tokens=4)
    assert run.engine.scheduler.preemptions > 10
    for name, ask in run.asks.items():
        assert run.tokens(name) == _alone(ask, name).tokens(name)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("numbers", [*([n] for n in range(12)), *([n, n + 3] for n in range(9))])
def test_out_of_memory_in_any_step_ends_no_request(numbers: list[int], async_scheduling: bool) -> None:
    """Some cases have two errors. The second comes while the engine handles the first."""
    asks = [Ask(STEM[i:], "ab"[i % 2], {"max_tokens": 5, "ignore_eos": True}) for i in range(4)]
    run, device = _run(asks, async_scheduling, faults={n: torch.OutOfMemoryError(f"at {n}") for n in numbers})
    assert len(device.history) > numbers[-1]
    assert not run.errors
    for name, ask in run.asks.items():
        assert run.tokens(name) == _alone(ask, name).tokens(name)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize(
    ("raised", "error"), [(torch.OutOfMemoryError("full"), OutOfMemory), (ValueError("bad"), RequestFailed)]
)
def test_a_request_that_fails_even_alone_fails_alone(
    raised: Exception, error: type[Exception], async_scheduling: bool
) -> None:
    asks = [Ask(STEM[i:], None, {"max_tokens": 5}, arrives=i) for i in range(5)]
    run, device = _run(asks, async_scheduling, seqs=8, poison={"2": raised})
    assert [output.request_id for output in run.errors] == ["2"]
    assert isinstance(run.errors[0].error, error)
    assert device.history.count("launch") < 24, "halving must find one of five in few tries"
    for name, ask in run.asks.items():
        assert run.tokens(name) == ([] if name == "2" else _alone(ask, name).tokens(name))


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_an_answer_that_fails_ends_its_siblings_in_the_same_step(async_scheduling: bool) -> None:
    engine, device, registry = late_engine(async_scheduling)
    run = Run(engine, registry, [Ask(params={"n": 3, "max_tokens": 9, "ignore_eos": True}), Ask(STEM[1:])])
    for _ in range(3):
        run.step()
    device.poison["0"] = ValueError("it fails from now on")
    run.to_the_end()
    assert [output.request_id for output in run.errors] == ["0"]
    assert run.tokens("1") == _alone(run.asks["1"], "1").tokens("1")


def test_an_answer_that_cannot_start_ends_its_siblings_before_they_are_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, device, registry = late_engine(async_scheduling=True)
    run = Run(engine, registry, [Ask(adapter="a", params={"n": 2, "ignore_eos": True})])
    for _ in range(3):
        run.step()
    before = len(device.history)
    failures = [[(engine._live["0"][1], AdapterInvalid("It is gone."))]]
    monkeypatch.setattr(engine._gate, "take_failures", lambda: failures.pop() if failures else [])
    run.to_the_end()
    assert device.history[before:] == ["read"]
    assert len(run.errors) == 1


def test_a_broken_device_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request can be served after this, so the process must end and be restarted."""
    broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def synchronize() -> None:
        raise broken

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    engine, _, _ = late_engine(async_scheduling=True, faults={0: broken})
    engine.add(Ask().request("0"), None, seed=1)
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        engine.step()


# -- random cases ---------------------------------------------------------------------------------

WORDS = st.integers(3, 11)
PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 9)},
    optional={
        "temperature": st.sampled_from([1.0, 3.0]),
        "top_p": st.sampled_from([0.5, 0.95]),
        "min_p": st.just(0.05),
        "repetition_penalty": st.just(1.4),
        "frequency_penalty": st.just(0.8),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.just((4,)),
        "ignore_eos": st.booleans(),
        "logprobs": st.just(2),
        "n": st.integers(2, 3),
    },
)
ASKS = st.builds(
    Ask,
    prompt=st.integers(1, 9).map(lambda n: STEM[:n]) | st.lists(WORDS, min_size=1, max_size=12).map(tuple),
    adapter=st.sampled_from([None, "a", "b", "c"]),
    params=PARAMS,
    arrives=st.integers(0, 12),
    leaves=st.none() | st.integers(0, 8),
    stops=st.none() | st.integers(0, 8),
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    asks=st.lists(ASKS, min_size=1, max_size=7),
    blocks=st.integers(6, 20),
    seqs=st.integers(1, 4),
    budget=st.integers(4, 20),
    head=st.sampled_from([2, 512]),
    fault=st.none() | st.integers(0, 40),
    async_scheduling=st.sampled_from([True, True, True, False]),
    slice_tokens=st.integers(1, 4),
)
def test_random_requests_have_the_same_tokens(
    asks: list[Ask],
    blocks: int,
    seqs: int,
    budget: int,
    head: int,
    fault: int | None,
    async_scheduling: bool,
    slice_tokens: int,
) -> None:
    faults: dict[int, Exception] = {} if fault is None else {fault: torch.OutOfMemoryError("somewhere")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_HEAD", head)
        sizes = {"blocks": blocks, "seqs": seqs, "budget": budget, "slice_tokens": slice_tokens}
        run, _ = _run(asks, async_scheduling, **sizes, faults=faults)
    assert not run.errors
    for name, ask in run.asks.items():
        quiet = _alone(ask, name)
        for index in range(ask.params.get("n", 1)):
            heard, expected = run.outputs.get((name, index), []), quiet.outputs[name, index]
            _check_same(heard, expected, whole=ask.leaves is None and (ask.stops is None or index > 0))


def _check_same(heard: list[Output], expected: list[Output], whole: bool) -> None:
    kept = [(output.token, output.logprobs, output.reason) for output in heard]
    assert kept == [(output.token, output.logprobs, output.reason) for output in expected][: len(kept)]
    assert not whole or len(heard) == len(expected)
