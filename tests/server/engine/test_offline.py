"""``LLM`` on a tiny model. It gives the server's answers in order and leaves nothing behind."""

from __future__ import annotations

import gc
import inspect
import json
import shutil
import textwrap
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterExists, AdapterInvalid, AdapterNotFound, BaseModelError
from server.config import ConfigError
from server.engine import offline
from server.engine.arguments import Prompt
from server.engine.engine import Output
from server.engine.offline import LLM, RequestOutput, SamplingParams
from server.errors import EngineDead, InvalidRequest, PromptTooLong, RequestFailed
from server.http.schema import ChatBody
from tests.support.running_engine import Asked, Driver, build
from tests.support.tiny_models import make_peft_adapter, make_tiny_model, tiny_tokenizer

SIZES: dict[str, Any] = {"kv_cache_memory": "8MiB", "threads": 1}
GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = ["lora rank", "tile", "mute sir noise", "a", "tin"]
ASKED = [{"role": "user", "content": [{"type": "text", "text": "tile"}, {"type": "text", "text": "rat"}]}]
OWN = "<|im_start|>[{{ messages[0].content }}]"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("library")
    make_tiny_model("llama", home / "model")
    make_peft_adapter(home / "model", home / "adapters" / "one", r=4, seed=1)
    make_peft_adapter(home / "model", home / "adapters" / "two", r=8, seed=2)
    shutil.copytree(home / "adapters" / "one", home / "elsewhere" / "own")
    (home / "elsewhere" / "own" / "chat_template.jinja").write_text(OWN)
    return home


@pytest.fixture(scope="module")
def llm(home: Path) -> Iterator[LLM]:
    by_name: Mapping[str, str | Path] = {
        "one": home / "adapters/one", "two": str(home / "adapters/two"), "own": home / "elsewhere/own",
    }  # fmt: skip
    with LLM(home / "model", by_name, home=home, **SIZES) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        parts = request.getfixturevalue("llm")._parts
        parts.engine.check_idle()
        parts.residency.check_integrity()
        assert parts.engine.scheduler.blocks.num_used == 0
        assert all(entry.in_flight == 0 for entry in parts.registry.entries())


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_answers_of_mixed_adapters_are_in_order_and_equal_the_engines(llm: LLM, home: Path) -> None:
    adapters = ["two", None, "one", "two", "one"]
    lengths = [12, 3, 8, 1, 5]  # the answers end in another order
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate(PROMPTS, params, adapters)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [output.adapter for output in outputs] == adapters
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    parts = build(home / "model", home)
    for output, length in zip(outputs, lengths, strict=True):
        asked = Asked(
            list(output.prompt_token_ids), output.adapter, {"max_tokens": length, "ignore_eos": True}
        )
        Driver(parts).run(asked)
        (answer,) = output.outputs
        assert list(answer.token_ids) == asked.tokens
        assert answer.text == parts.tokenizer.decode(asked.tokens, skip_special_tokens=True)
        assert (answer.finish_reason, answer.logprobs) == ("length", None)
        assert list(output.prompt_token_ids) == parts.tokenizer.encode(output.prompt or "")
    parts.close()


def test_one_prompt_is_a_text_or_token_ids(llm: LLM) -> None:
    (as_text,) = llm.generate("lora rank", GREEDY)
    (as_ids,) = llm.generate(as_text.prompt_token_ids, GREEDY)
    both: list[Prompt] = [list(as_text.prompt_token_ids), "lora rank"]
    listed = llm.generate(both, GREEDY)
    assert (as_text.prompt, as_ids.prompt) == ("lora rank", None)
    assert texts([as_ids, *listed]) == [as_text.outputs[0].text] * 3
    assert llm.generate([]) == llm.chat([]) == []


def test_overrides_are_checked_and_served(home: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0}
    with LLM(home / "model", home=home, rope_scaling=rope, **SIZES) as scaled:
        assert scaled._open.info.max_model_len == 1024
        digest = scaled._open.info.digest
    (verdict,) = json.loads((home / "bases" / f"{digest}.checked.json").read_text())
    assert verdict["deviation"] < 0.15
    with pytest.raises(BaseModelError, match="no field 'rope'"):
        LLM(home / "model", home=home, hf_overrides={"rope": 1}, **SIZES)


def test_several_answers_with_logprobs(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=6, logprobs=2, ignore_eos=True)
    first, again = llm.generate(["lora rank"] * 2, params, "one")
    assert [answer.index for answer in first.outputs] == [0, 1, 2]
    assert len({answer.token_ids for answer in first.outputs}) == 3
    assert [a.token_ids for a in first.outputs] == [a.token_ids for a in again.outputs]
    for answer in first.outputs:
        assert answer.logprobs is not None
        assert tuple(one.token_id for one in answer.logprobs) == answer.token_ids
        assert all(len(one.top) == 2 and one.logprob <= 0 for one in answer.logprobs)
        assert "".join(one.token for one in answer.logprobs) == answer.text


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True)
    first, second = llm.generate(["tile", "tile"], params)
    assert first.outputs[0].token_ids != second.outputs[0].token_ids


@pytest.mark.parametrize("n", [1, 2])
def test_a_stop_string_ends_an_answer_and_is_cut_off(llm: LLM, n: int) -> None:
    long = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (whole,) = texts(llm.generate("tile", long))
    stop = whole[8:10]
    until = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, stop=(stop,), n=n)
    stopped, other = llm.generate(["tile", "a"], [until, long])
    for answer in stopped.outputs:
        assert answer.text == whole[: whole.index(stop)]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        assert len(answer.token_ids) < 30
    assert len(other.outputs[0].token_ids) == 30


def test_a_conversation_is_rendered_as_the_server_renders_it(llm: LLM, home: Path) -> None:
    body = ChatBody.model_validate({"model": "tiny", "messages": ASKED})
    parts = build(home / "model", home)
    served = parts.tokenizer.render_chat([message.rendered() for message in body.messages])
    parts.close()
    base, one, own = llm.chat([ASKED] * 3, GREEDY, [None, "one", "own"])
    assert list(base.prompt_token_ids) == list(one.prompt_token_ids) == served
    assert tiny_tokenizer().decode(own.prompt_token_ids) == "<|im_start|>[tile\nrat]"
    assert texts(llm.generate([served, served], GREEDY, [None, "one"])) == texts([base, one])
    assert llm.chat(ASKED, GREEDY)[0].outputs == base.outputs


def test_an_adapters_own_end_token_ends_answers(home: Path, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path / "model")
    shutil.copytree(home / "adapters" / "one", tmp_path / "ends")
    free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(tmp_path / "model", {"plain": tmp_path / "ends"}, home=tmp_path, **SIZES) as llm:
        tokens = llm.generate("tile", free, "plain")[0].outputs[0].token_ids
    (tmp_path / "ends" / "generation_config.json").write_text(f'{{"eos_token_id": [{tokens[2]}]}}')
    with LLM(tmp_path / "model", {"ends": tmp_path / "ends"}, home=tmp_path, **SIZES) as llm:
        (answer,) = llm.generate("tile", GREEDY, "ends")[0].outputs
    assert answer.token_ids == tokens[: tokens.index(tokens[2]) + 1]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("unknown", ["onee", "model", "", "../one"])
def test_an_unknown_adapter_is_never_the_base(llm: LLM, unknown: str) -> None:
    with pytest.raises(AdapterNotFound, match="no adapter"):
        llm.generate(PROMPTS[:2], GREEDY, [None, unknown])
    with pytest.raises(AdapterNotFound):
        llm.chat(ASKED, GREEDY, unknown)


@pytest.mark.parametrize(
    ("field", "params"),
    [
        ("temperature", {"temperature": 3.0}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": "0.5"}),
        ("top_k", {"top_k": 1.5}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": None}),
        ("min_tokens", {"min_tokens": 17}),
        ("n", {"n": 0}),
        ("n", {"n": True}),
        ("logprobs", {"logprobs": 21}),
        ("presence_penalty", {"presence_penalty": -3.0}),
        ("stop", {"stop": "end"}),
        ("stop", {"stop": ("",)}),
        ("stop_token_ids", {"stop_token_ids": (512,)}),
        ("logit_bias", {"logit_bias": {9999: 1.0}}),
        ("logit_bias[5]", {"logit_bias": {5: 101}}),
        ("logit_bias", {"logit_bias": {"5": 1.0}}),
        ("logit_bias", {"logit_bias": [(5, 1.0)]}),
    ],
)
def test_a_wrong_value_is_refused_by_name(llm: LLM, field: str, params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(PROMPTS[:2], [GREEDY, SamplingParams(**params)])
    assert caught.value.param == field


def test_wrong_prompts_are_refused_before_anything_is_generated(llm: LLM) -> None:
    too_long: list[Prompt] = ["tile", [5] * 600]
    empty: list[Prompt] = ["tile", []]
    wrong: Any = ["tile", 5]
    steps = llm._open.engine.scheduler.steps
    with pytest.raises(PromptTooLong, match=r"512 tokens.*600"):
        llm.generate(too_long, GREEDY)
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        llm.generate([[5, 512]], GREEDY)
    with pytest.raises(InvalidRequest, match="at least one token"):
        llm.generate(empty, GREEDY, "one")
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]"):
        llm.generate(wrong, GREEDY)
    with pytest.raises(InvalidRequest, match="one for each"):
        llm.generate(PROMPTS, GREEDY, ["one", "two"])
    with pytest.raises(InvalidRequest, match="one for each"):
        llm.generate(PROMPTS, [GREEDY])
    for message in (
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": "x", "name": "y"},
    ):
        with pytest.raises(InvalidRequest, match=r"messages\[0\]"):
            llm.chat([message], GREEDY)
    assert llm._open.engine.scheduler.steps == steps


def test_a_request_that_fails_ends_the_call_and_the_next_one_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, before = llm._open.engine, texts(llm.generate(PROMPTS, GREEDY, "one"))
    real = engine.step

    def failing() -> list[Output]:
        outputs = real()
        if outputs:
            outputs[-1] = Output(outputs[-1].request_id, 0, token=-1, error=RequestFailed("on purpose"))
        return outputs

    monkeypatch.setattr(engine, "step", failing)
    with pytest.raises(RequestFailed, match="on purpose"):
        llm.generate(PROMPTS, GREEDY, "one")
    monkeypatch.undo()
    assert texts(llm.generate(PROMPTS, GREEDY, "one")) == before


def test_calls_of_several_threads_take_turns(llm: LLM) -> None:
    alone = texts(llm.generate(PROMPTS, GREEDY, "two"))
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(texts(llm.generate(PROMPTS, GREEDY, "two"))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 4


def test_the_bases_sampling_defaults_are_used_without_params(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(
        '{"eos_token_id": 2, "temperature": 0.0, "max_new_tokens": 5}'
    )
    with LLM(tmp_path / "model", home=tmp_path, **SIZES) as llm:
        first, second = llm.generate(["tile", "tile"])
    assert first.outputs == second.outputs
    assert len(first.outputs[0].token_ids) <= 5


def test_a_folder_of_adapters_and_one_that_comes_later(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "adapters", tmp_path / "adapters")
    (tmp_path / "adapters" / "broken").mkdir()
    (tmp_path / "adapters" / "broken" / "adapter_config.json").write_text("{")
    (tmp_path / "adapters" / "broken" / "adapter_model.safetensors").write_text("")
    with LLM(home / "model", tmp_path / "adapters", home=tmp_path, **SIZES) as llm:
        base, one, two = texts(llm.generate(["tile"] * 3, GREEDY, [None, "one", "two"]))
        assert len({base, one, two}) == 3
        shutil.copytree(home / "adapters" / "one", tmp_path / "adapters" / "later")
        assert texts(llm.generate("tile", GREEDY, "later")) == [one]
        with pytest.raises(AdapterInvalid, match="broken"):
            llm.generate("tile", GREEDY, "broken")
        with pytest.raises(AdapterNotFound, match="did you mean"):
            llm.generate("tile", GREEDY, "late")


def test_adapters_that_cannot_be_served_raise_at_once(home: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="no folder"):
        LLM(home / "model", tmp_path / "nowhere", home=home, **SIZES)
    with pytest.raises(AdapterInvalid):
        LLM(home / "model", {"one": tmp_path / "nowhere"}, home=home, **SIZES)
    with pytest.raises(AdapterExists, match="base's own name"):
        LLM(home / "model", {"model": home / "adapters" / "one"}, home=home, **SIZES)


def test_options_are_those_of_the_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        LLM(home / "model", max_num_seq=8)
    for option in ("port", "adapter_dir", "max_queued_requests", "log_level"):
        with pytest.raises(ConfigError, match=option):
            LLM(home / "model", None, **{option: 1})
    with pytest.raises(ConfigError, match=r"--max-num-seqs '0'"):
        LLM(home / "model", max_num_seqs=0)
    monkeypatch.setenv("MANYLORA_HOME", str(home))
    monkeypatch.setenv("MANYLORA_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("MANYLORA_ADAPTER_DIR", str(home / "adapters"))
    monkeypatch.setenv("MANYLORA_PORT", "none of our business")
    with LLM(home / "model", enable_prefix_caching=False, max_model_len=64, **SIZES) as llm:
        assert llm._open.info.max_model_len == 64
        assert llm._open.engine.scheduler.limits.max_num_seqs == 3
        with pytest.raises(AdapterNotFound):
            llm.generate("tile", GREEDY, "one")
        (again,) = [llm.generate(["tile " * 20], GREEDY)[0] for _ in range(2)][1:]
        assert again.num_cached_tokens == 0


def test_closing_frees_everything(home: Path) -> None:
    before = set(threading.enumerate())
    with LLM(home / "model", {"own": home / "elsewhere" / "own"}, home=home, **SIZES) as llm:
        llm.chat(ASKED, GREEDY, "own")
        held = [weakref.ref(llm._open.base.model), weakref.ref(llm._open.residency.pool)]
        held += [weakref.ref(llm._open.model), weakref.ref(llm._open.engine)]
    llm.close()
    gc.collect()
    assert [one() for one in held] == [None] * 4
    assert set(threading.enumerate()) <= before
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("tile")
    with pytest.raises(EngineDead, match="closed"):
        llm.chat(ASKED)


def test_the_example_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = inspect.getdoc(offline) or ""
    example = textwrap.dedent(words[words.index("    from server") : words.index("\nAll prompts")])
    assert len(example.strip().splitlines()) <= 15
    shutil.copytree(home / "elsewhere" / "own", home / "adapters" / "pirate")
    monkeypatch.chdir(home)
    monkeypatch.setenv("MANYLORA_KV_CACHE_MEMORY", "8MiB")
    monkeypatch.setenv("MANYLORA_HOME", str(home))
    exec(example.replace('"smollm2-135m"', '"model"'), {})
    shutil.rmtree(home / "adapters" / "pirate")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("pirate ")
    assert any(line.startswith("base ") for line in said)
    assert said[-1].endswith(("length", "stop"))
