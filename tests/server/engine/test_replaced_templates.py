"""Adapters with their own chat template, in the service: prompts, end tokens and replacement."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from server.config import from_args
from server.engine.build import build_service
from server.engine.interface import Generation, GenerationRequest
from server.engine.sampling_params import SamplingParams
from server.engine.service import EngineService
from server.errors import InvalidRequest
from tests.support.tiny_models import make_peft_adapter, make_tiny_model, tiny_tokenizer

FAST = tiny_tokenizer()
ASKED = [{"role": "user", "content": "tile rat"}]
OWN = "<|im_start|>[{{ messages[0].content }}]"
NEVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    make_tiny_model("llama", tmp_path / "model")
    make_peft_adapter(tmp_path / "model", tmp_path / "plain", r=4)
    return tmp_path


def deploy(home: Path, name: str, **files: str) -> None:
    """Copy the plain adapter, add ``files``, and rename the folder into place."""
    new, served = home / f"new-{name}", home / "adapters" / name
    shutil.copytree(home / "plain", new)
    for file, text in files.items():
        (new / file.replace("__", ".")).write_text(text)
    served.parent.mkdir(exist_ok=True)
    if served.exists():
        shutil.rmtree(served)
    new.rename(served)


@pytest_asyncio.fixture
async def service(home: Path, request: pytest.FixtureRequest) -> AsyncIterator[EngineService]:
    deploy(home, "plain-one")
    deploy(home, "own", chat_template__jinja=OWN)
    flags = ["--kv-cache-memory", "4MiB", "--threads", "1", *getattr(request, "param", ())]
    config = from_args(["--base", str(home / "model"), "--home", str(home), *flags], environ={})
    service = build_service(config)
    await service.start()
    for name in ("plain-one", "own"):
        await until_digest_is_not(service, name, None)
    yield service
    service.stop()


async def until_digest_is_not(service: EngineService, name: str, digest: str | None) -> str:
    async with asyncio.timeout(30):
        while True:
            for status in service.adapters():
                if status.name == name and status.state == "ready" and status.digest not in (None, digest):
                    assert status.digest is not None
                    return status.digest
            await asyncio.sleep(0.05)


async def prompt_of(service: EngineService, name: str | None) -> str:
    with service.holding(name) as version:
        return str(FAST.decode(await service.render_chat(ASKED, version)))


async def ask(
    service: EngineService, name: str, prompt: tuple[int, ...] = (5, 6), **params: int
) -> Generation:
    sampling = SamplingParams(max_tokens=params.pop("max_tokens", 3), temperature=0.0, **params)  # type: ignore[arg-type]
    with service.holding(name) as version:
        return await service.submit(GenerationRequest("r", prompt, name, sampling, version))


async def test_each_adapter_gets_prompts_from_its_own_template(service: EngineService) -> None:
    base = FAST.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert await prompt_of(service, None) == base
    assert await prompt_of(service, "plain-one") == base
    assert await prompt_of(service, "own") == "<|im_start|>[tile rat]"


@pytest.mark.parametrize("service", [["--ignore-adapter-templates"]], indirect=True)
async def test_adapter_templates_can_be_ignored(service: EngineService) -> None:
    assert await prompt_of(service, "own") == await prompt_of(service, None)
    digests = {status.digest for status in service.adapters()}
    assert len(digests) == 1


async def test_the_version_that_renders_is_the_one_that_answers(service: EngineService, home: Path) -> None:
    digest = await until_digest_is_not(service, "own", None)
    with service.holding("own") as version:
        prompt = await service.render_chat(ASKED, version)
        warm = await ask(service, "own")  # load it onto the device, because its folder will be removed
        [_ async for _ in warm]
        deploy(home, "own", chat_template__jinja="{{ messages[0].content }}!")
        newer = await until_digest_is_not(service, "own", digest)
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        generation = await service.submit(GenerationRequest("q", tuple(prompt), "own", sampling, version))
    [_ async for _ in generation]
    assert generation.fingerprint.endswith(digest[:12])
    assert await prompt_of(service, "own") == "tile rat!"
    later = await ask(service, "own")
    [_ async for _ in later]
    assert later.fingerprint.endswith(newer[:12])
    assert [status.in_flight for status in service.adapters() if status.name == "own"] == [0]


async def test_an_adapter_ends_answers_with_its_own_token(service: EngineService, home: Path) -> None:
    free = await ask(service, "plain-one", max_tokens=8)
    tokens = [delta.token_ids[0] async for delta in free]
    assert len(tokens) == 8
    deploy(home, "ends", generation_config__json=json.dumps({"eos_token_id": [tokens[2]]}))
    await until_digest_is_not(service, "ends", None)
    ended = [delta async for delta in await ask(service, "ends", max_tokens=8)]
    assert [delta.token_ids[0] for delta in ended] == tokens[: tokens.index(tokens[2]) + 1]
    assert ended[-1].finish_reason == "stop"


async def test_a_template_that_refuses_and_one_that_never_ends_give_different_errors(
    service: EngineService, home: Path
) -> None:
    deploy(
        home,
        "picky",
        chat_template__jinja=OWN + "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}",
    )
    await until_digest_is_not(service, "picky", None)
    with (
        service.holding("picky") as version,
        pytest.raises(InvalidRequest, match=r"own chat template .*: one"),
    ):
        await service.render_chat([*ASKED, *ASKED], version)
    deploy(home, "endless", chat_template__jinja=NEVER)
    async with asyncio.timeout(60):
        while not any(status.name == "endless" and status.state == "failed" for status in service.adapters()):
            await asyncio.sleep(0.1)
            assert await prompt_of(service, "own") == "<|im_start|>[tile rat]"
    (status,) = (status for status in service.adapters() if status.name == "endless")
    assert "takes more than 2 s" in (status.reason or "")
