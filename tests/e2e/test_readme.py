"""What the README shows is what happens: its transcript, its commands, its options."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from server.config.options import OPTIONS
from tests.e2e.running_server import RunningServer

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def _commands(program: str) -> list[list[str]]:
    lines = "\n".join(_blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


def test_the_transcript_is_true(server: RunningServer) -> None:
    (code, _), (expected,) = _blocks("python"), _blocks("text")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace(ADDRESS, server.url), "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_the_fine_tuning_example_gives_a_model(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Path("adapters/samples/data/fernhill-tickets.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:8]))
    monkeypatch.chdir(tmp_path)
    _, code = _blocks("python")
    code = code.replace(ADDRESS, server.url).replace('"n_epochs": 3', '"n_epochs": 1')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue().startswith("ft:smollm2-135m:acme:")


def test_every_curl_command_answers(server: RunningServer) -> None:
    commands = _commands("curl")
    assert len(commands) == 4
    for command in commands:
        here = [word.replace(ADDRESS, server.url) for word in command]
        result = subprocess.run(
            [*here, "--silent", "--fail-with-body"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout
        if "completions" in command[1]:
            assert "honey" in json.loads(result.stdout)["choices"][0]["message"]["content"]


def test_every_option_named_exists() -> None:
    ours = re.sub(r"^docker .*$", "", README, flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours))
    elsewhere = set()
    for path in [
        *Path("server/bench").rglob("*.py"),
        *Path("server/finetune/command").glob("*.py"),
        Path("server/finetune/evaluation/cli.py"),
    ]:
        elsewhere |= set(re.findall(r'"(--[a-z-]+)"', path.read_text()))
    known = {option.flag for option in OPTIONS} | elsewhere | {"--help"}
    assert named <= known


def test_every_file_named_exists() -> None:
    for path in re.findall(r"`((?:adapters|server|tests)/[^`]*)`", README):
        assert list(Path().glob(path)), path
