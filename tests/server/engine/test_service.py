"""The service on a tiny model, with the event loop and the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from adapters.errors import AdapterExists, AdapterNameInvalid, AdapterNotFound
from server.config import from_args
from server.engine.build import build_service
from server.engine.interface import Delta, Generation, GenerationRequest
from server.engine.sampling_params import SamplingParams
from server.engine.sequence import Chunk
from server.engine.service import EngineService
from server.errors import EngineDead, InvalidRequest, PromptTooLong, QueueFull, RequestFailed, ShuttingDown
from server.pools import Pool
from tests.support.tiny_models import make_peft_adapter, make_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_tiny_model("llama", home / "model")
    make_peft_adapter(home / "model", home / "adapters" / "one")
    return home


@pytest_asyncio.fixture
async def service(home: Path) -> AsyncIterator[EngineService]:
    flags = [
        "--kv-cache-memory",
        "4MiB",
        "--max-queued-requests",
        "3",
        "--max-num-seqs",
        "2",
        "--threads",
        "1",
    ]
    service = build_service(
        from_args(["--base", str(home / "model"), "--home", str(home), *flags], environ={})
    )
    await service.start()
    await _served(service, "one")
    yield service
    service.stop()


async def _served(service: EngineService, name: str) -> None:
    async with asyncio.timeout(10):
        while not service.has_adapter(name):
            await asyncio.sleep(0.05)


async def _ask(
    service: EngineService, request_id: str = "r", adapter: str | None = None, **params: Any
) -> Generation:
    sampling = SamplingParams(**({"max_tokens": 5, "temperature": 0.0, "ignore_eos": True} | params))
    return await service.submit(GenerationRequest(request_id, tuple(range(10, 40)), adapter, sampling))


async def _all(generation: Generation) -> list[Delta]:
    return [delta async for delta in generation]


async def _until_free(service: EngineService) -> None:
    async with asyncio.timeout(10):
        while service.stats().running or service.stats().waiting or service.stats().kv_blocks_used:
            await asyncio.sleep(0.01)


async def test_an_answer_comes_with_its_fingerprint(service: EngineService) -> None:
    generation = await _ask(service, adapter="one")
    deltas = await _all(generation)
    assert [len(delta.token_ids) for delta in deltas] == [1] * 5
    assert deltas[-1].finish_reason == "length"
    status = next(status for status in service.adapters() if status.name == "one")
    assert status.digest is not None
    assert generation.fingerprint == f"nf4-{service.base.digest[:12]}-lora-{status.digest[:12]}"
    assert generation.queue_seconds is not None
    assert generation.queue_seconds >= 0
    assert status.tier == "device"
    await _until_free(service)


async def test_only_the_engines_thread_computes_in_parallel(home: Path) -> None:
    flags = ["--kv-cache-memory", "4MiB", "--threads", "3"]
    service = build_service(
        from_args(["--base", str(home / "model"), "--home", str(home), *flags], environ={})
    )
    real, seen = service._engine.model, set()

    def watching(chunks: Sequence[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        logits = real(chunks, prev_tokens=prev_tokens)
        seen.add((torch.get_num_threads(), logits.exp().sum().isfinite().item()))
        return logits

    service._engine.model = watching
    await service.start()
    await _all(await _ask(service))
    service.stop()
    assert {threads for threads, _ in seen} == {3}
    assert torch.get_num_threads() == 1
    assert await Pool("tokenizing").run(torch.get_num_threads) == 1


async def test_cancelling_frees_at_once(service: EngineService) -> None:
    generation = await _ask(service, max_tokens=400)
    async for _ in generation:
        generation.cancel()
        generation.cancel()
    await _until_free(service)
    assert await service.drain(1)


async def test_a_stop_string_ends_it_in_the_engine_too(service: EngineService) -> None:
    text = "".join(delta.text for delta in await _all(await _ask(service, max_tokens=30)))
    stop = text[8:10]
    deltas = await _all(await _ask(service, max_tokens=400, stop=(stop,)))
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    await _until_free(service)


async def test_invalid_requests_are_refused_at_once(service: EngineService) -> None:
    with pytest.raises(AdapterNotFound, match="did you mean 'one'"):
        await _ask(service, adapter="onee")
    with pytest.raises(PromptTooLong, match=r"512 tokens.*600"):
        await service.submit(GenerationRequest("r", (5,) * 600, None, SamplingParams(max_tokens=1)))
    with pytest.raises(InvalidRequest, match="at least one"):
        await service.submit(GenerationRequest("r", (), None, SamplingParams(max_tokens=1)))
    for field, params in (
        ("logit_bias", {"logit_bias": {9999: 1.0}}),
        ("stop_token_ids", {"stop_token_ids": (-1,)}),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await _ask(service, **params)
        assert caught.value.param == field


async def test_the_queue_is_bounded(service: EngineService) -> None:
    running = [await _ask(service, f"run{i}", max_tokens=300) for i in range(2)]
    readers = [asyncio.create_task(_all(generation)) for generation in running]
    async with asyncio.timeout(10):
        while service.stats().running < 2:
            await asyncio.sleep(0.005)
    waiting = [await _ask(service, f"wait{i}") for i in range(3)]
    with pytest.raises(QueueFull) as caught:
        await _ask(service, "one-too-many")
    assert 1 <= caught.value.retry_after <= 60
    for generation in running:
        generation.cancel()
    for reader in readers:
        reader.cancel()
    for generation in waiting:
        assert len(await _all(generation)) == 5


async def test_draining_finishes_running_requests_and_refuses_new_ones(service: EngineService) -> None:
    reader = asyncio.create_task(_all(await _ask(service, max_tokens=50)))
    service.begin_drain()
    with pytest.raises(ShuttingDown):
        await _ask(service, "late")
    assert await service.drain(20)
    assert len(await reader) == 50


async def test_loading_and_unloading_by_a_client(service: EngineService, home: Path) -> None:
    make_peft_adapter(home / "model", home / "adapters" / "two", seed=5)
    status = await service.load_adapter("alias", "two", replace=False)
    assert (status.name, status.state) == ("alias", "ready")
    with pytest.raises(AdapterExists):
        await service.load_adapter("alias", "one", replace=False)
    for nowhere in ("three", "two/three", str(home / "adapters" / "three")):
        with pytest.raises(AdapterNotFound) as caught:
            await service.load_adapter("alias", nowhere, replace=True)
        assert str(caught.value) == f"There is no {nowhere!r} in the adapter folder."
    with pytest.raises(AdapterNameInvalid) as refused:
        await service.load_adapter("alias", "/etc", replace=True)
    assert str(home) not in str(refused.value)
    await service.load_adapter("alias", "one", replace=True)
    await service.unload_adapter("alias")
    assert not service.has_adapter("alias")
    await service.unload_adapter("one")
    await asyncio.sleep(1.0)  # two looks of the watcher while the folder is still there
    assert not service.has_adapter("one")
    await service.load_adapter("one", "one", replace=False)


async def test_an_adapter_that_just_arrived_is_found(
    service: EngineService, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._watcher, "scan_once", lambda **_: None)  # its next look is much later
    make_peft_adapter(home / "model", home / "adapters" / ".new", seed=7)
    (home / "adapters" / ".new").rename(home / "adapters" / "new")
    assert not service.has_adapter("new")
    assert await service.find_adapter("new")
    assert len(await _all(await _ask(service, adapter="new"))) == 5
    assert not await service.find_adapter("newer")


async def test_a_request_that_raises_fails_alone(service: EngineService) -> None:
    real = service._engine.model

    def crashing(chunks: Sequence[Chunk], *, prev_tokens: Tensor | None = None) -> Tensor:
        if any(chunk.sequence.request_id == "victim" for chunk in chunks):
            raise RuntimeError("boom")
        return real(chunks, prev_tokens=prev_tokens)

    service._engine.model = crashing
    victim, other = await _ask(service, "victim"), await _ask(service, "other")
    with pytest.raises(RequestFailed):
        await _all(victim)
    assert len(await _all(other)) == 5
    assert service.failure() is None


async def test_if_the_engines_loop_ends_all_requests_fail(service: EngineService) -> None:
    running = await _ask(service, max_tokens=400)
    await anext(aiter(running))

    def broken() -> list[Chunk]:
        raise ValueError("the block manager is inconsistent")

    service._engine.scheduler.schedule = broken  # type: ignore[method-assign]
    with pytest.raises(EngineDead, match="the block manager is inconsistent"):
        await _all(running)
    assert service.failure() == "ValueError: the block manager is inconsistent"
    with pytest.raises(EngineDead):
        await _ask(service, "later")
