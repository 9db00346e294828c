"""The real peers that ``bench peers-setup`` installed. Each must answer with the requested adapter.

The reference is PEFT in bf16 on the same weights. The sample adapters change every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from adapters.base import DEFAULT_BASE, PreparedBase, prepare_base
from server.bench.peers import Setup, peer
from server.bench.peers.environments import Environment
from server.bench.peers.http import HttpServer
from server.bench.serving.client import payload
from server.bench.serving.endpoint import Endpoint
from server.bench.serving.workload import Call
from tests.support.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLES = ROOT / "adapters" / "samples"
ADAPTERS = {name: SAMPLES / name for name in ("pirate", "json-answers")}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
MAX_TOKENS = 24
NAMES = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def dense(manylora_home: Path) -> PreparedBase:
    return prepare_base(DEFAULT_BASE, manylora_home, quantization="none")


@pytest.fixture(scope="module")
def prompt(dense: PreparedBase) -> tuple[int, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense.path)
    return tuple(tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False))


@pytest.fixture(scope="module")
def expected(dense: PreparedBase, prompt: tuple[int, ...]) -> dict[str | None, str]:
    """PEFT's greedy answers by adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dense.path)
    base = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, ADAPTERS["pirate"], adapter_name="pirate")
    model.load_adapter(ADAPTERS["json-answers"], adapter_name="json-answers")

    def answer() -> str:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False)
        return str(tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True))

    answers: dict[str | None, str] = {}
    with model.disable_adapter():
        answers[None] = answer()
    for name in ADAPTERS:
        model.set_adapter(name)
        answers[name] = answer()
    return answers


@pytest.fixture(params=["llama.cpp", "vllm", "vllm:eager"])
def ask(
    request: pytest.FixtureRequest, dense: PreparedBase, manylora_home: Path, tmp_path: Path
) -> Iterator[Callable[[Call], str]]:
    """A function that sends a call to a running peer and returns the answer."""
    if not Environment(request.param.partition(":")[0], manylora_home).is_complete():
        pytest.skip(f"{request.param} is not set up; run manylora bench peers-setup")
    server = peer(request.param)
    assert isinstance(server, HttpServer)
    setup = Setup(dense.path, ADAPTERS, tmp_path, DEFAULT_BASE, manylora_home, slots=4, context=512)
    try:
        server.start(setup)
        yield lambda call: complete(server.endpoint, call)
    finally:
        server.stop()


def complete(endpoint: Endpoint, call: Call) -> str:
    body = payload(endpoint, call) | {"stream": False, "ignore_eos": False, "min_tokens": 0}
    del body["stream_options"]
    url = endpoint.base_url + endpoint.path
    answer = httpx.post(url, json=body, timeout=120, trust_env=False).raise_for_status().json()
    return str(answer["choices"][0]["text"])


def test_every_answer_is_the_adapters_own(
    ask: Callable[[Call], str], prompt: tuple[int, ...], expected: dict[str | None, str]
) -> None:
    assert len(set(expected.values())) == len(NAMES)
    assert {name: ask(Call(name, prompt, MAX_TOKENS)) for name in NAMES} == expected
