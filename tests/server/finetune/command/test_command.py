"""``manylora train`` from the user's side: exit codes, the run folder, kill -9 and signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.training import RunFolder
from server import cli
from server.finetune.command import command
from server.finetune.command.provenance import Provenance
from server.finetune.evaluation.gate import Decision
from tests.support.training_tasks import make_task


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command on a tiny base, without the option for the run folder."""
    folder = tmp_path_factory.mktemp("command")
    task = make_task(folder)
    options = {"--data": task["data"], "--base": task["base"], "--home": task["home"], "--name": "acme"}
    options |= {"--batch-size": 4, "--r": 4, "--lr": 0.01, "--threads": 1, "--epochs": 4}
    return ["train", *(str(word) for pair in options.items() for word in pair)]


def result(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "result.json").read_text())
    return value


def places(words: list[str], folder: Path) -> list[str]:
    """The options for the held-out rows, the run folder and the adapter folder."""
    held_out = Path(words[2]).with_name("eval.jsonl")
    return ["--eval", str(held_out), "--run-dir", str(folder / "run"), "--output-dir", str(folder / "out")]


def test_a_trained_adapter_is_evaluated_and_published(words: list[str], tmp_path: Path) -> None:
    options = places(words, tmp_path)
    assert cli.main([*words, *options, "--require-improvement", "--job", "ftjob-1"]) == 0
    told = result(tmp_path / "run")
    provenance = Provenance(Path(words[words.index("--home") + 1]))
    assert provenance.job_of(tmp_path / "out" / "acme", "acme") == "ftjob-1"
    assert (told["status"], told["adapter"], told["path"]) == (
        "published",
        "acme",
        str(tmp_path / "out" / "acme"),
    )
    assert told["evaluation"]["adapter"]["loss"] < told["evaluation"]["base"]["loss"]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*words, *options, "--require-improvement", "--resume"]) == 0  # it has ended already


def test_an_adapter_that_is_not_better_is_kept_but_not_published(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "decide", lambda _: Decision(False, "It is not better."))
    options = places(words, tmp_path)
    assert cli.main([*words, *options, "--max-steps", "1", "--require-improvement"]) == 0
    told = result(tmp_path / "run")
    assert (told["status"], told["adapter"], told["reason"]) == ("kept", None, "It is not better.")
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    assert not (tmp_path / "out").exists()


def test_all_bad_rows_are_named_before_training(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": []}\n' * 30)
    assert cli.main([*words, "--data", str(bad), "--run-dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [str(number) for number in range(1, 31)]
    assert lines[-1] == "manylora train: bad.jsonl has 30 rows that cannot be used."
    assert (result(tmp_path / "run")["status"], result(tmp_path / "run")["error_type"]) == (
        "failed",
        "DatasetInvalid",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ["--require-improvement"],
        ["--r", "0"],
        ["--method", "magic"],
        ["--name", "../x"],
        ["--name", "acme.tmp"],
        ["--name", "ft_3aacme"],
        ["--target-modules", "nothing"],
        ["--method", "adalora", "--max-steps", "3"],
        ["--lr", "x"],
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    words: list[str], tmp_path: Path, wrong: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main([*words, "--run-dir", str(tmp_path / "run"), *wrong])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("manylora train: ")


def test_the_base_keeps_its_name(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = Path(words[words.index("--base") + 1]).name
    assert cli.main([*words, "--run-dir", str(tmp_path / "run"), "--name", base]) == 2
    assert f"{base!r} is the base's own name" in capfd.readouterr().err


def started(words: list[str], run: Path, *options: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "server.cli", *words, "--run-dir", str(run), *options]
    return subprocess.Popen([*line, "--output-dir", str(run.parent / "out")], stderr=subprocess.DEVNULL)


def until(run: Path, text: str, child: subprocess.Popen[bytes]) -> None:
    """Wait until the metrics say ``text``."""
    deadline = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or text not in metrics.read_text():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_and_a_stopped_run_resume_with_the_same_curve(words: list[str], tmp_path: Path) -> None:
    slow = ["--checkpoint-steps", "2", "--duty", "0.3", "--dropout", "0.1"]
    run = tmp_path / "run"
    killed = started(words, run, *slow)
    until(run, "checkpoint-4", killed)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (run / "result.json").exists()
    stopped = started(words, run, *slow, "--resume")
    until(run, "checkpoint-8", stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 130
    assert result(run)["status"] == "interrupted"
    assert started(words, run, *slow[:2], "--dropout", "0.1", "--resume").wait() == 0
    assert result(run)["status"] == "published"
    whole = ["--run-dir", str(tmp_path / "whole"), "--output-dir", str(tmp_path / "out")]
    assert cli.main([*words, *whole, "--dropout", "0.1", "--checkpoint-steps", "2"]) == 0
    curves = [RunFolder(path, resume=True).curve("step") for path in (run, tmp_path / "whole")]
    assert curves[0] == curves[1]
    assert os.listdir(tmp_path / "out") == ["acme"]


def test_the_output_has_only_the_commands_own_lines(words: list[str], tmp_path: Path) -> None:
    """Other packages warn and show progress bars. Without a terminal all output is lines."""
    options = [*places(words, tmp_path), "--max-steps", "2"]
    trained = [sys.executable, "-m", "server.cli", *words, *options]
    done = subprocess.run(trained, capture_output=True, text=True, check=True)
    ours = re.compile(
        r"(Warning: )?(train|eval)\.jsonl: |4-bit weights |lora, rank |Step \d|Evaluating|base |adapter |"
        r"loss over |The adapter is |Published | +loss  exact match"
    )
    assert [line for line in done.stderr.splitlines() if not ours.match(line)] == []
    assert "Evaluating 4 rows through the serving engine." in done.stderr
    measured = [sys.executable, "-m", "server.cli", "eval", "--adapter", str(tmp_path / "out" / "acme")]
    measured += ["--data", str(words[2]), *words[3:7]]
    assert subprocess.run(measured, capture_output=True, text=True, check=True).stderr == ""
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = [event for event in told if event["event"] == "evaluated"]
    assert evaluated["exact_match"] == result(tmp_path / "run")["evaluation"]["adapter"]["exact_match"]
    assert any(event["event"] == "evaluating" for event in told)


def test_check_reports_without_training(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = places(words, tmp_path)
    assert cli.main([*words, *options, "--check"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["error"] is None
    assert "4 of 4 rows are also training rows" in told["warnings"][-1]
    assert cli.main([*words, *options, "--check", "--max-lora-rank", "3"]) == 2
    refused = capsys.readouterr()
    assert "--r 4 is too large to be served" in json.loads(refused.out)["error"]
    assert refused.err.startswith("manylora train: --r 4 is too large")
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*words, *options, "--max-lora-rank", "3"]) == 2
    assert result(tmp_path / "run")["error_type"] == "RecipeInvalid"
