from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from server.bench.errors import BenchError
from server.bench.peers.http import free_port
from server.bench.serving.client import Answer, discover, play
from server.bench.serving.endpoint import Endpoint, Path
from server.bench.serving.workload import Call, Load, Workload, make_workload
from tests.server.bench.fake_server import ADAPTERS, FakeServer, serving


@pytest.fixture(scope="module")
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture(scope="module")
def url(fake: FakeServer) -> Iterator[str]:
    with serving(fake) as base_url:
        yield base_url


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_every_call_is_played_exactly(fake: FakeServer, url: str, path: Path) -> None:
    fake.bodies.clear()
    workload = make_workload(Load(num_prompts=6, input_len=9, output_len=5, max_concurrency=2), ADAPTERS, 1)
    result = await play(Endpoint(url, "base", path), workload)
    for record in result.records:
        assert record.error is None
        assert (record.prompt_tokens, record.output_tokens, len(record.chunks)) == (9, 5, 5)
        assert record.sent <= record.first <= record.last
        assert list(record.chunks) == sorted(record.chunks)
    assert sorted(body["model"] for body in fake.bodies) == sorted(ADAPTERS * 3)
    assert all(body["ignore_eos"] and body["min_tokens"] == body["max_tokens"] == 5 for body in fake.bodies)


async def test_prompts_go_out_as_token_ids_and_no_adapter_means_the_base(fake: FakeServer, url: str) -> None:
    fake.bodies.clear()
    await play(Endpoint(url, "base"), Workload((Call(None, (7, 8), 1),)))
    assert [(body["model"], body["prompt"]) for body in fake.bodies] == [("base", [7, 8])]


async def test_a_server_may_have_its_own_way_to_choose_adapters(fake: FakeServer, url: str) -> None:
    fake.bodies.clear()
    fields = {"lora-0000": {"lora": [1.0]}, None: {"lora": [0.0]}}
    calls = (Call("lora-0000", (7,), 1), Call(None, (7,), 1))
    await play(Endpoint(url, "base", fields=fields), Workload(calls, max_concurrency=1))
    assert [body["lora"] for body in fake.bodies] == [[1.0], [0.0]]


async def test_failures_are_records(url: str) -> None:
    calls = tuple(Call(model, (1,), 3) for model in ("missing", "short", "base"))
    errors = [record.error for record in (await play(Endpoint(url, "base"), Workload(calls))).records]
    assert errors[0] is not None
    assert errors[0].startswith("HTTP 404")
    assert errors[1:] == ["the stream ended before [DONE]", None]


async def test_a_dead_server_fails_every_call() -> None:
    result = await play(
        Endpoint(f"http://127.0.0.1:{free_port()}", "base"), Workload((Call(None, (1,), 1),) * 2)
    )
    assert all(record.error and "ConnectionRefusedError" in record.error for record in result.records)


async def test_discovery(url: str) -> None:
    assert await discover(url, None) == ("base", ADAPTERS)
    with pytest.raises(BenchError, match="does not list models"):
        await discover(f"http://127.0.0.1:{free_port()}", None)


def answer(*events: object, done: bool = True) -> Answer:
    one = Answer(sent=0)
    for now, event in enumerate(events, start=1):
        one.take(json.dumps(event).encode(), float(now))
    if done:
        one.take(b"[DONE]", 99.0)
    return one


USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
TOKEN = {"choices": [{"text": "x", "finish_reason": None}]}
HELD_BACK = {"choices": [{"text": "", "finish_reason": None}]}
FINISH = {"choices": [{"text": "", "finish_reason": "length"}]}


def test_which_chunks_hold_tokens() -> None:
    assert answer(HELD_BACK, TOKEN, FINISH, USAGE).record(2).chunks == (1, 2)
    # the finish is the last token, with empty text
    assert answer(TOKEN, FINISH, USAGE).record(2).chunks == (1, 2)


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (answer(TOKEN, TOKEN), "no usage"),
        (answer(TOKEN, USAGE, done=False), r"before \[DONE\]"),
        (answer(TOKEN, {"error": {"message": "boom"}}), "boom"),
        (answer(TOKEN, {"unknown": 1}), "not a completion chunk"),
        (answer(TOKEN, ["list"]), "not a completion chunk"),
        (answer(USAGE), "2 tokens arrived in 0 chunks"),
        (
            answer(TOKEN, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
            "1 tokens arrived",
        ),
    ],
)
def test_what_counts_as_an_error(one: Answer, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_good(one)


def assert_good(one: Answer) -> None:
    error = one.record(2).error
    assert error is None, error
