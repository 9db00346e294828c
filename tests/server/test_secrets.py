"""Only the server can see keys and state."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import from_args
from server.finetune.jobs.command import train_environ
from server.secrets import forget_keys, keys_of, make_private

SERVER = """
import os, subprocess, sys
from server import serve
from server.config import resolve
from server.config.options import OneLineParser, add_options
from tests.server.fake_engine import FakeEngine

class Engine(FakeEngine):
    def __init__(self, config): super().__init__()

def report(service, config, listener):
    child = subprocess.run(["env", "-0"], capture_output=True, text=True).stdout
    print(child.replace("\\n", " "), flush=True)

serve._announce = report
parser = OneLineParser()
add_options(parser)
serve.run(resolve(parser.parse_args(), os.environ), Engine)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The state folder as an earlier version left it."""
    home = tmp_path / "state"
    (home / "files").mkdir(parents=True)
    (home / "files" / "file-1").write_text("{}")
    (home / "state.sqlite3").touch()
    for path in (home, home / "files"):
        path.chmod(0o755)
    (home / "state.sqlite3").chmod(0o644)
    return home


@pytest.fixture
def server(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server with keys on its command line and in variables, and the environment of its child."""
    words = ["--home", str(home), "--port", "0", "--api-key", "typed-one", "--api-key=typed-two"]
    environ = os.environ | {
        "MANYLORA_ADMIN_KEY": "root-key",
        "CLIENT_KEYS": "other,root-key",
        "OTHER": "kept",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *words],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    yield process, process.stdout.readline()
    process.terminate()
    process.communicate(timeout=20)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_neither_in_ps_nor_in_children(
    server: tuple[subprocess.Popen[str], str], home: Path
) -> None:
    process, environ = server
    shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    assert not any(b"typed" in word for word in shown)
    assert shown[-4:-1] == [b"--api-key", b"x" * 9, b"--api-key=" + b"x" * 9]
    assert shown[3:5] == [b"--home", str(home).encode()]
    assert not any(word in environ for word in ("root-key", "CLIENT_KEYS", "MANYLORA_ADMIN_KEY"))
    assert "OTHER=kept" in environ
    process.terminate()
    _, log = process.communicate(timeout=20)
    assert sum("--api-key-file" in json.loads(line)["message"] for line in log.splitlines()) == 1
    assert "typed-" not in log
    assert mode(home) == mode(home / "files") == mode(home / "jobs") == 0o700
    assert mode(home / "state.sqlite3") == 0o600


def test_only_variables_with_a_key_are_removed() -> None:
    environ = {"A": "k", "B": "x, k", "C": "kk", "PATH": "/k:/bin", "D": "x\nk"}
    forget_keys(environ, ["k"])
    assert environ == {"C": "kk", "PATH": "/k:/bin"}


def test_all_keys_are_collected() -> None:
    words = ["--api-key", "a", "--api-key", "b", "--admin-key", "c", "--metrics-key", "d"]
    assert keys_of(from_args(words, {}).http) == {"a", "b", "c", "d"}
    assert keys_of(from_args([], {}).http) == frozenset()


def test_a_job_inherits_no_option_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_API_KEY", "k")
    assert not any("MANYLORA" in name for name in train_environ(from_args([], {}).training))


def test_a_folder_that_is_not_ours_stays_as_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "chmod", refuse)
    monkeypatch.setattr(os, "umask", lambda _: 0)
    make_private(home)
    assert mode(home) == 0o755
    assert any(str(home) in str(record.__dict__["fields"]) for record in caplog.records)
