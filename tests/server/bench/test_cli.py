from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.bench.cli import add_parser
from tests.server.bench.fake_server import ADAPTERS, FakeServer, serving
from tests.support.tiny_models import TinyBase

SMALL = ["--num-prompts", "4", "--random-input-len", "6", "--random-output-len", "3"]


@pytest.fixture(scope="module")
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture(scope="module")
def url(fake: FakeServer) -> Iterator[str]:
    with serving(fake) as base_url:
        yield base_url


def bench(*arguments: str) -> int:
    return run("serving", *arguments)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="manylora")
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["bench", *arguments])
    code = parsed.run(parsed)
    assert isinstance(code, int)
    return code


def test_a_measurement_from_end_to_end(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert (
        bench("--base-url", url, *SMALL, "--repeats", "2", "--api-key", "k", "--save-result", str(out)) == 0
    )
    assert "output tokens/s" in capsys.readouterr().out
    result = json.loads(out.read_text())
    (server,) = result["servers"]
    assert len(server["runs"]) == 2
    assert server["median"]["total_output_tokens"] == 12
    assert server["errors"] == []
    assert result["config"]["request_rate"] == "inf"
    assert result["machine"]["cores"] >= 1
    assert "api_key" not in result["config"]


def test_our_own_server_beside_a_peer(
    tiny_base: TinyBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(tiny_base("llama").prepared.path)
    target = ["--base", base, "--home", str(tmp_path), "--num-adapters", "3", "--peers", "peft"]
    out = tmp_path / "result.json"
    saved = ["--save-result", str(out)]
    flags = ["--", "--kv-cache-memory", "16MiB", "--threads", "1"]
    assert bench(*target, *SMALL, "--random-token-range", "10", "500", *saved, *flags) == 0
    assert "manylora/peft" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert all(server["median"]["peak_memory_mib"] > 100 for server in result["servers"])
    assert [server["median"]["total_output_tokens"] for server in result["servers"]] == [12, 12]
    assert result["ratios"]["peft"]["output_throughput"]["median"] > 0
    assert result["config"]["server_args"] == flags[1:]


def test_a_sweep_over_adapters(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "result.png"
    words = ["--sweep-adapters", "1,2", "--repeats", "2", "--save-result", str(out), "--plot", str(plot)]
    assert bench("--base-url", url, *SMALL, *words) == 0
    assert "distinct adapters" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["axis"] == "distinct adapters"
    assert [point["at"] for point in result["points"]] == [1, 2]
    assert [len(point["servers"][0]["runs"]) for point in result["points"]] == [2, 2]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rates", ["50,100", "50%,70%"])
def test_a_sweep_over_the_load(url: str, tmp_path: Path, rates: str) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "result.png"
    words = ["--sweep-load", rates, "--save-result", str(out), "--plot", str(plot)]
    assert bench("--base-url", url, *SMALL, *words) == 0
    result = json.loads(out.read_text())
    assert [f"{point['at']:g}" for point in result["points"]] == rates.replace("%", "").split(",")
    assert all(rate > 0 for rate in result["saturation"].values())
    assert bool(result["saturation"]) == ("%" in rates)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_sweep_needs_as_many_adapters(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--base-url", url, *SMALL, "--sweep-adapters", "3") == 2
    assert "there are 2 adapters" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--sweep-adapters", "1", "--plot", "x.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_cold_means_that_no_request_was_sent_before(fake: FakeServer, url: str) -> None:
    fake.bodies.clear()
    assert bench("--base-url", url, *SMALL, "--cold") == 0
    assert len(fake.bodies) == 4


def test_peers_that_need_no_setup_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("peers-setup", "peft") == 2
    assert "choose from: llama.cpp, vllm" in capsys.readouterr().err


def test_a_failed_request_is_an_exit_code(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--base-url", url, *SMALL, "--model", ADAPTERS[0], "missing") == 1
    assert "2 times HTTP 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-url", "http://127.0.0.1:9", "--peers", "peft"], "remove --base-url"),
        (["--base-url", "http://127.0.0.1:9", "--", "--max-loras", "3"], "remove --base-url"),
        (["--base-url", "http://127.0.0.1:9"], "does not list models"),
        (["--model", "x"], "need --base-url"),
        (["--random-token-range", "5", "5"], "is empty"),
        (["--peers", "llama.cpp", "--home", "nowhere"], "run: manylora bench peers-setup llama.cpp --home"),
        (["--cold", "--repeats", "2"], "without warm-up"),
        (["--cold", "--sweep-adapters", "1,2"], "a sweep is several"),
        (["--sweep-load", "50%", "--peers", "peft"], "PEFT has no scheduler"),
        (["--plot", "x.png"], "add --sweep-adapters"),
    ],
)
def test_contradictions_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num-prompts", "0"],
        ["--request-rate", "nan"],
        ["--peers", "peft,ollama"],
        ["--peers", "llama.cpp:q9"],
        ["--sweep-adapters", "1,0"],
        ["--sweep-load", "50%,2"],
        ["--sweep-load", "inf"],
        ["--sweep-load", "1", "--sweep-adapters", "1"],
    ],
)
def test_wrong_values_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serving", "--repeats", "x"], "'x' must be a whole number, at least 1"),
        (["step", "--steps", "0"], "'0' must be a whole number, at least 1"),
        (["step", "--num-adapters", "-1"], "'-1' must be a whole number, at least 0"),
        (["roofline", "--rank", "0"], "'0' must be a whole number, at least 1"),
    ],
)
def test_numbers_that_are_too_small_are_refused_by_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert f"argument {arguments[1]}: {message}" in capsys.readouterr().err


def test_measuring_imports_no_torch() -> None:
    code = "import sys, server.bench.cli, server.bench.peers.peft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
