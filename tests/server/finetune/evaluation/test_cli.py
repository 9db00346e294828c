"""``manylora eval``: how an adapter is named, and what is printed. Other tests cover the measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFound
from server import cli
from server.config import from_args
from server.finetune.evaluation import evaluate
from server.finetune.evaluation.cli import find_adapter
from server.finetune.evaluation.result import Answers, Evaluation, Scores

FOUND = Evaluation(
    rows=3,
    tokens=40,
    short_rows=1,
    seconds=1.5,
    base=Scores(3.25, 0.0, 0.125),
    adapter=Scores(0.5, 1.0, 1.0),
    replaced=None,
    answers=(Answers(2, "A-1", {"base": "Sure!", "adapter": "A-1"}),),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "adapters" / "served").mkdir(parents=True)
    (tmp_path / "trained").mkdir()
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A-1"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **__: FOUND)
    return tmp_path / "home"


def test_an_adapter_is_a_name_or_a_folder(home: Path) -> None:
    config = from_args(["--home", str(home)], environ={})
    assert find_adapter("served", config) == home / "adapters" / "served"
    assert find_adapter("trained", config) == Path("trained")
    assert find_adapter(str(home), config) == home
    (home / "adapters" / "ft_3abase_3aacme_3a1").mkdir()
    assert find_adapter("ft:base:acme:1", config) == home / "adapters" / "ft_3abase_3aacme_3a1"
    with pytest.raises(AdapterNotFound, match="'neither' is neither an adapter in"):
        find_adapter("neither", config)


def test_the_table_and_the_gates_sentence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "--home", str(home), "--adapter", "served", "--data", "rows.jsonl"]
    assert cli.main([*words, "--answers", "answers.jsonl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "              loss  exact match  token F1",
        "base        3.2500         0.0%     12.5%",
        "adapter     0.5000       100.0%    100.0%",
        "loss over 40 tokens of 3 rows; exact match and token F1 over 1 rows with a short reference; 1.5 s",
        "The adapter is better: its exact match is 100.0%, and 0.0% for the base.",
    ]
    answers = {"line": 2, "reference": "A-1", "base": "Sure!", "adapter": "A-1"}
    assert json.loads(Path("answers.jsonl").read_text()) == answers


def test_json_has_all_figures_and_the_gate(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["eval", "--home", str(home), "--adapter", "trained", "--data", "rows.jsonl", "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["adapter"] == {"loss": 0.5, "exact_match": 1.0, "token_f1": 1.0}
    assert printed["gate"]["publish"] is True


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--adapter", "nowhere", "--data", "rows.jsonl"], 1),
        (["--adapter", "served", "--data", "nowhere.jsonl"], 1),
        (["--adapter", "served", "--data", "rows.jsonl", "--quantization", "int3"], 2),
    ],
)
def test_errors_are_one_line(
    home: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--home", str(home), *words]) == code
    message = capsys.readouterr().err
    assert message.startswith("manylora eval: ")
    assert message.count("\n") == 1
