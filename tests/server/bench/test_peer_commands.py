"""How peers are started and sent requests. Fakes replace their tools and servers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from server.bench.errors import BenchError
from server.bench.peers import Setup, convert_loras, llama_cpp, vllm
from server.bench.peers.environments import RECIPES, Environment
from tests.server.bench.fake_server import FakeServer, serving


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Two adapters of ranks 4 and 12, and environments that look installed."""
    adapters = {}
    for name, config in {"one": {"r": 4}, "two": {"r": 2, "rank_pattern": {"q_proj": 12}}}.items():
        adapters[name] = tmp_path / "adapters" / name
        adapters[name].mkdir(parents=True)
        (adapters[name] / "adapter_config.json").write_text(json.dumps(config))
    for name, (requirement, _) in RECIPES.items():
        packages = tmp_path / "peers" / name / "lib" / "python3" / "site-packages"
        packages.mkdir(parents=True)
        (tmp_path / "peers" / name / "complete").write_text(requirement)
    dense = SimpleNamespace(path=tmp_path / "dense", digest="d1")
    dense.path.mkdir()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (dense.path / "config.json").write_text(json.dumps(sizes))
    for module in (llama_cpp, vllm):
        monkeypatch.setattr(module, "dense_base", lambda _: dense)
    return Setup(tmp_path, adapters, tmp_path, source="x", home=tmp_path, slots=4, context=256)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of llama.cpp's tools. Each fake tool writes its output file."""
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        called.append(command)
        written = command[-1] if "--outfile" in command else command[-2]
        if "convert_loras" not in command[2]:
            Path(written).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    return called


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_llama_cpp_serves_converted_files(setup: Setup, tools: list[list[str]]) -> None:
    command = llama_cpp.LlamaCppPeer().command(setup, 99)
    assert value(command, "--model").endswith("models/d1.iq4_nl.gguf")
    assert value(command, "--lora") == ",".join(
        str(setup.scratch / f"llama.cpp/{n}.gguf") for n in ("one", "two")
    )
    assert (value(command, "--parallel"), value(command, "--ctx-size")) == ("4", "1024")
    loras, base, quantise = tools
    assert loras[-4:] == ["one", "two", *map(str, setup.adapters.values())]
    assert base[1].endswith("convert_hf_to_gguf.py")
    assert quantise[-1] == "IQ4_NL"


def test_llama_cpps_base_is_converted_once(setup: Setup, tools: list[list[str]]) -> None:
    converter = llama_cpp.Tools(Environment("llama.cpp", setup.home))
    first = converter.convert_base(setup, "q4_0")
    assert converter.convert_base(setup, "q4_0") == first
    converter.convert_base(setup, "iq4_nl")
    assert [Path(command[1]).name.partition(".")[0] for command in tools] == [
        "convert_hf_to_gguf",
        "d1",
        "d1",
    ]


def test_a_failing_converter_is_reported(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no such architecture")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with pytest.raises(BenchError, match="no such architecture"):
        llama_cpp.LlamaCppPeer().command(setup, 99)


@pytest.fixture
def url() -> Iterator[str]:
    listed = [{"id": 1, "path": "/x/one.gguf", "scale": 0}, {"id": 0, "path": "/x/two.gguf", "scale": 0}]
    fake = FakeServer()
    fake.app = Starlette(routes=[Route("/lora-adapters", lambda _: JSONResponse(listed))])
    with serving(fake) as base_url:
        yield base_url


def test_llama_cpp_gets_a_scale_for_every_adapter(url: str) -> None:
    peer = llama_cpp.LlamaCppPeer()
    assert peer.known(url) == {"one", "two"}
    scales = {
        name: {one["id"]: one["scale"] for one in fields["lora"]} for name, fields in peer.fields(url).items()
    }
    assert scales == {None: {0: 0, 1: 0}, "one": {0: 0, 1: 1}, "two": {0: 1, 1: 0}}


def test_vllm_gets_every_adapter_and_a_sufficient_rank(setup: Setup) -> None:
    command = vllm.VllmPeer("eager").command(setup, 99)
    assert value(command, "--max-lora-rank") == "16"
    # 4 requests of 256 tokens, twice; keys and values of 2 layers with 2 heads of 16 in bf16
    assert value(command, "--kv-cache-memory-bytes") == str(2 * 4 * 256 * 2 * 2 * 2 * 16 * 2)
    assert value(command, "--max-loras") == value(command, "--max-cpu-loras") == "2"
    assert command[-2:] == [f"{name}={folder}" for name, folder in setup.adapters.items()]
    assert "--enforce-eager" in command
    assert "--enforce-eager" not in vllm.VllmPeer().command(setup, 99)


def test_a_base_alone_needs_no_adapter_flags(setup: Setup, tools: list[list[str]]) -> None:
    bare = Setup(setup.base, {}, setup.scratch, "x", setup.home, setup.slots, setup.context)
    assert "--enable-lora" not in vllm.VllmPeer().command(bare, 99)
    assert "--lora" not in llama_cpp.LlamaCppPeer().command(bare, 99)
    assert not any("convert_loras" in command[2] for command in tools)


def test_adapters_are_converted_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(runpy, "run_path", lambda *_, **__: seen.append(sys.argv[1:]))
    convert_loras.main(["/s/convert.py", "/base", "/out", "a", "b", "/fa", "/fb"])
    assert [words[-1] for words in seen] == ["/fa", "/fb"]
    assert [value(words, "--outfile") for words in seen] == ["/out/a.gguf", "/out/b.gguf"]
