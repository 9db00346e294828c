"""The engine on a tiny real model: properties besides correct tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.artifact import CONFIG_FILE, WEIGHTS_FILE
from adapters.errors import AdapterError
from server.engine.build import Parts
from server.engine.sequence import Chunk
from server.errors import RequestFailed
from tests.support.running_engine import Asked, Driver, build
from tests.support.tiny_models import make_peft_adapter, make_tiny_model

PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_tiny_model("llama", home / "model")
    for seed, name in enumerate(("one", "two", "three")):
        make_peft_adapter(home / "model", home / "adapters" / name, r=4 + seed, seed=seed)
    return home


@pytest.fixture(params=["--no-async-scheduling", "--async-scheduling"])
def parts(home: Path, request: pytest.FixtureRequest) -> Parts:
    return build(home / "model", home, request.param)


def _check_empty(parts: Parts) -> None:
    parts.engine.check_idle()
    parts.residency.check_integrity()
    assert parts.residency.pins == 0
    assert parts.engine.scheduler.blocks.num_used == 0
    assert all(entry.in_flight == 0 for entry in parts.registry.entries())


def _alone(home: Path, asked: Asked, *flags: str) -> list[int]:
    """The tokens of the same request in a new engine."""
    again = Asked(asked.prompt, asked.adapter, asked.params)
    Driver(build(home / "model", home, *flags)).run(again)
    return again.tokens


def test_the_prefix_cache_is_separate_for_each_adapter(parts: Parts) -> None:
    driver = Driver(parts)
    first, again = Asked(PROMPT, "one"), Asked(PROMPT, "one")
    other, base = Asked(PROMPT, "two"), Asked(PROMPT)
    for asked in (first, again, other, base):
        driver.run(asked)
    assert [asked.outputs[0].cached for asked in (first, again, other, base)] == [0, 32, 0, 0]
    assert again.tokens == first.tokens
    _check_empty(parts)


@pytest.mark.parametrize("scheduling", ["--no-async-scheduling", "--async-scheduling"])
def test_preemption_changes_no_token(home: Path, scheduling: str) -> None:
    parts = build(home / "model", home, "--kv-cache-memory", "44KiB", "--max-num-seqs", "4", scheduling)
    requests = [
        Asked(PROMPT[i:], name, {"max_tokens": 40, "ignore_eos": True})
        for i, name in enumerate(("one", "two", None))
    ]
    driver = Driver(parts)
    driver.resident("one", "two")
    driver.run(*requests)
    assert parts.engine.scheduler.preemptions > 0
    _check_empty(parts)
    for asked in requests:
        assert asked.tokens == _alone(home, asked)


def test_async_scheduling_changes_no_token_of_transformers_blocks(home: Path) -> None:
    requests = [Asked(PROMPT, "one", {"ignore_eos": True}), Asked(PROMPT, None, {"ignore_eos": True})]
    parts = build(home / "model", home, "--quantization", "none", "--async-scheduling")
    assert parts.model.name == "transformers"
    driver = Driver(parts)
    driver.resident("one")
    driver.run(*requests)
    _check_empty(parts)
    for asked in requests:
        assert asked.tokens == _alone(home, asked, "--quantization", "none")


def test_several_answers_share_the_prompt_and_differ(parts: Parts) -> None:
    asked = Asked(PROMPT, "one", {"n": 3, "temperature": 1.0, "seed": 7})
    Driver(parts).run(asked)
    answers = [[o.token for o in asked.outputs if o.index == i] for i in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3
    assert [next(o.cached for o in asked.outputs if o.index == i) for i in range(3)] == [0, 32, 32]
    _check_empty(parts)


def test_a_seed_gives_the_same_tokens_beside_other_requests(parts: Parts) -> None:
    params = {"temperature": 1.0, "seed": 11, "max_tokens": 12}
    driver = Driver(parts)
    alone = Asked(PROMPT, "one", params)
    driver.run(alone)
    crowd = [
        Asked(PROMPT[i:], name, {"temperature": 1.0})
        for i, name in enumerate(("two", None, "three", "one"), 1)
    ]
    together = Asked(PROMPT, "one", params)
    driver.run(*crowd, together)
    assert together.tokens == alone.tokens


def test_aborting_frees_everything_in_every_state(parts: Parts) -> None:
    driver = Driver(parts)
    running, held, waiting = Asked(PROMPT, "one"), Asked(PROMPT, "two", {"n": 3}), Asked(PROMPT, "three")
    driver.add(running)
    driver.run()
    for asked in (Asked(PROMPT, "one", {"max_tokens": 50}), held, waiting):
        driver.add(asked)
        driver.step()
        parts.engine.abort(asked.request_id)
        parts.engine.abort(asked.request_id)
    driver.run()
    _check_empty(parts)


def test_ending_one_answer_does_not_end_the_others(parts: Parts) -> None:
    driver = Driver(parts)
    asked = driver.add(Asked(PROMPT, None, {"n": 2, "max_tokens": 6, "ignore_eos": True}))
    while not asked.outputs:
        driver.step()
    parts.engine.abort_answer(asked.request_id, 0)
    driver.run()
    assert [output.index for output in asked.outputs] == [0, 1, 1, 1, 1, 1, 1]
    assert parts.engine.take_ended() == [asked.request_id]
    _check_empty(parts)


def test_a_crash_fails_only_the_request_that_causes_it(parts: Parts, home: Path) -> None:
    victim = Asked(PROMPT[5:], "two")
    real = parts.engine.model

    def crashing(chunks: SequenceOf[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        if any(chunk.sequence.request_id == victim.request_id for chunk in chunks):
            raise RuntimeError("only for the victim")
        return real(chunks, prev_tokens=prev_tokens)

    parts.engine.model = crashing
    others = [Asked(PROMPT, "one"), Asked(PROMPT[3:])]
    Driver(parts).run(others[0], victim, others[1])
    assert isinstance(victim.error, RequestFailed)
    for asked in others:
        assert asked.tokens == _alone(home, asked)
    _check_empty(parts)


def test_an_adapter_with_nan_fails_only_its_own_requests(parts: Parts) -> None:
    driver = Driver(parts)
    driver.resident("one", "two")
    slot = parts.residency.pin(parts.registry.resolve("one"))
    parts.residency.unpin(parts.registry.resolve("one").digest)
    for site in parts.residency.pool.sites.values():
        site.b[site.rows[slot]] = float("nan")  # type: ignore[index]
    bad, good = Asked(PROMPT, "one"), Asked(PROMPT, "two")
    driver.run(bad, good)
    assert isinstance(bad.error, RequestFailed)
    assert good.error is None
    assert len(good.tokens) == 8
    _check_empty(parts)


def _copy_home(home: Path, tmp_path: Path) -> Path:
    shutil.copytree(home / "adapters", tmp_path / "adapters")
    return tmp_path


def _replace(folder: Path, model: Path, seed: int) -> None:
    fresh = make_peft_adapter(model, folder.with_name(".fresh"), seed=seed)
    shutil.rmtree(folder)
    fresh.rename(folder)


def test_replacing_leaves_running_requests_on_their_version(home: Path, tmp_path: Path) -> None:
    own = _copy_home(home, tmp_path)
    parts = build(home / "model", own)
    driver = Driver(parts)
    params: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True}
    quiet = Asked(PROMPT, "one", params)
    driver.run(quiet)
    before = parts.registry.resolve("one")

    driver.resident("one")
    old = driver.add(Asked(PROMPT, "one", params))
    while len(old.tokens) < 5:
        driver.step()
    _replace(own / "adapters" / "one", home / "model", seed=99)
    parts.registry.register("one", own / "adapters" / "one", replace=True)
    new = Asked(PROMPT, "one", params)
    driver.run(new)

    assert old.tokens == quiet.tokens
    assert new.tokens != quiet.tokens
    assert new.outputs[0].cached == 0, "the old version's cached KV was used"
    assert {output.digest for output in old.outputs} == {before.digest}
    assert parts.residency.tier(before.digest) == "disk", "the old version's memory is still held"
    _check_empty(parts)


def test_a_request_that_has_not_started_takes_the_new_version(home: Path, tmp_path: Path) -> None:
    own = _copy_home(home, tmp_path)
    parts = build(home / "model", own)
    driver = Driver(parts)
    waiting = driver.add(Asked(PROMPT, "one"))
    _replace(own / "adapters" / "one", home / "model", seed=98)
    driver.step()  # finds that the content has changed, before the new version is registered
    new = parts.registry.register("one", own / "adapters" / "one", replace=True)
    driver.run()
    assert {output.digest for output in waiting.outputs} == {new.digest}
    assert waiting.error is None
    _check_empty(parts)


def test_a_request_whose_adapter_is_removed_before_it_starts_fails(home: Path, tmp_path: Path) -> None:
    own = _copy_home(home, tmp_path)
    parts = build(home / "model", own)
    driver = Driver(parts)
    waiting, base = driver.add(Asked(PROMPT, "one")), driver.add(Asked(PROMPT))
    shutil.rmtree(own / "adapters" / "one")
    parts.registry.unregister("one")
    driver.run()
    assert isinstance(waiting.error, AdapterError)
    assert base.error is None
    assert len(base.tokens) == 8
    _check_empty(parts)


def test_more_adapters_than_room_are_all_served(home: Path, tmp_path: Path) -> None:
    for seed in range(12):
        make_peft_adapter(home / "model", tmp_path / "adapters" / f"a{seed}", r=8, seed=seed)
    parts = build(home / "model", tmp_path, "--lora-pool-rows", "16")
    crowded = [Asked(PROMPT, f"a{i % 12}", {"max_tokens": 3}) for i in range(24)]
    Driver(parts).run(*crowded, each_step=parts.residency.check_integrity)
    assert all(len(asked.tokens) == 3 or asked.tokens[-1] == 2 for asked in crowded)
    assert parts.residency.stats.evictions >= 10
    _check_empty(parts)


def test_a_thousand_registered_with_room_for_eight(home: Path, tmp_path: Path) -> None:
    """One cold adapter follows another. The pool has room for eight and the host tier for ten."""
    config = (home / "adapters" / "one" / CONFIG_FILE).read_bytes()
    tensors = load_file(home / "adapters" / "one" / WEIGHTS_FILE)
    name, tensor = next((key, value) for key, value in tensors.items() if "lora_B" in key)
    for i in range(1000):
        folder = tmp_path / "adapters" / f"tenant{i}"
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_bytes(config)
        save_file(tensors | {name: tensor + i / 1000}, folder / WEIGHTS_FILE)
    nbytes = 1 + sum(2 * tensor.numel() for tensor in tensors.values())
    rows = ["--lora-pool-rows", "32", "--max-lora-rank", "4", "--lora-host-memory", str(10 * nbytes)]
    parts = build(home / "model", tmp_path, *rows)
    assert len(parts.registry.entries()) == 1000
    asked = [Asked(PROMPT, f"tenant{37 * i % 1000}", {"max_tokens": 2}) for i in range(60)]
    Driver(parts).run(*asked)
    assert all(request.error is None and request.tokens for request in asked)
    assert parts.residency.stats.loads == 60
    assert parts.residency.host.nbytes <= 10 * nbytes
    assert (
        sum(parts.residency.tier(e.version.digest) == "device" for e in parts.registry.entries() if e.version)
        == 8
    )
    _check_empty(parts)
