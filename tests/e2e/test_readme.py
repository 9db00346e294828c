"""The transcript, the examples and the curl commands of the README and ``docs`` work as shown."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.project import ROOT
from tests.support.running_server import RunningServer

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:8000"


def _blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _commands(program: str) -> list[list[str]]:
    blocks = [block for page in PAGES for block in _blocks("sh", page)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(program)]


def test_the_transcript_is_true(server: RunningServer) -> None:
    readme = ROOT / "README.md"
    code, (expected,) = _blocks("python", readme)[0], _blocks("text", readme)
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
    (code,) = _blocks("python", ROOT / "docs" / "training.md")
    code = code.replace(ADDRESS, server.url).replace('"n_epochs": 3', '"n_epochs": 1')
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "training.md", "exec"), {})
    assert printed.getvalue().startswith("ft:smollm2-135m:acme:")


def test_the_librarys_answers_equal_the_servers(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_HOME", str(state))
    monkeypatch.chdir(ROOT)
    readme = ROOT / "README.md"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(_blocks("python", readme)[1], "README.md", "exec"), {})
    (transcript,) = _blocks("text", readme)
    base, pirate, _ = transcript.splitlines()
    assert printed.getvalue().splitlines() == [pirate, base.replace("smollm2-135m", "base", 1)]


def test_every_curl_command_answers(server: RunningServer) -> None:
    commands = _commands("curl")
    assert len(commands) == 5
    for command in commands:
        here = [word.replace(ADDRESS, server.url) for word in command]
        result = subprocess.run(
            [*here, "--silent", "--fail-with-body"], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout
        if "completions" in command[1]:
            assert "honey" in json.loads(result.stdout)["choices"][0]["message"]["content"]
