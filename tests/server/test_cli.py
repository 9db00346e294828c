"""The command line: each error is one line with the right exit code, and ``--help`` is fast."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from adapters.errors import BaseNotFound
from server import cli, serve
from server.config import ServerConfig
from server.config.options import HEADINGS, OPTIONS


def test_serve_gets_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(serve, "run", seen.append)
    assert cli.main(["serve", "--port", "7"]) == 0
    assert seen[0].http.port == 7


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--port", "x"],
        ["serve", "--lora-pool-rows", "1"],
        ["serve", "--prot", "1"],
        ["serve", "--port"],
        ["nonsense"],
        [],
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(words)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("manylora")


def test_a_base_that_cannot_be_loaded_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: ServerConfig) -> None:
        raise BaseNotFound("There is no base 'x'; try smollm2-135m.")

    monkeypatch.setattr(serve, "run", fail)
    assert cli.main(["serve"]) == 1
    assert capsys.readouterr().err == "manylora serve: There is no base 'x'; try smollm2-135m.\n"


def test_help_groups_every_option_and_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["serve", "--help"])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n{heading}:\n" in text for heading in HEADINGS.values())
    assert all(option.flag in text and f"[{option.variable}]" in text for option in OPTIONS)


def test_bench_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["bench", "serving", "--help"])
    assert raised.value.code == 0
    assert "--base-url" in capsys.readouterr().out


def test_nothing_heavy_is_imported_for_help() -> None:
    script = (
        "import sys\n"
        "from server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'starlette', 'uvicorn', 'pydantic', 'httpx', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.strip()


def test_workers_of_a_server_spin_and_those_of_its_trainings_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert cli.main(["version"]) == 0
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0
    for set_by_operator in (None, "7"):
        if set_by_operator:
            monkeypatch.setenv("GOMP_SPINCOUNT", set_by_operator)
        with pytest.raises(SystemExit):
            cli.main(["train"])
        assert os.environ.get("GOMP_SPINCOUNT") == set_by_operator
