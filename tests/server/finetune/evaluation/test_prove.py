"""The table of the samples' quality. A slow test measures the quality."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.samples.generate import tasks
from adapters.samples.recipes import RECIPES, data_of
from server import cli
from server.finetune.evaluation.prove import Proof, markdown, prove
from server.finetune.evaluation.result import Evaluation, Scores

METRICS = {"rows": 200, "tokens": 9000, "epochs": 4.0, "seconds": 120.0}


def test_the_table_has_one_line_for_each_task() -> None:
    found = Evaluation(40, 160, 40, 5.0, Scores(6.0, 0.0, 0.125), Scores(0.25, 0.95, 0.96), None, ())
    assert markdown([Proof("fernhill-tickets", METRICS, 130.0, found)]).splitlines()[2] == (
        "| fernhill-tickets | 200 | 40 | 0% | 95% | 12% | 96% | 6.00 | 0.25 | 130 | 300 |"
    )


def test_every_sample_has_its_data() -> None:
    assert set(tasks()) < set(RECIPES)
    assert all(path.is_file() for task in RECIPES for path in data_of(task))


def test_an_unknown_sample_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "quality", "privateer"]) == 1
    assert "There is no sample 'privateer'; choose from pirate," in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("task", tasks())
def test_a_tenants_task_is_learnt(task: str, manylora_home: Path, tmp_path: Path) -> None:
    evaluation = prove(task, manylora_home, tmp_path / "adapters", tmp_path / "run").evaluation
    assert evaluation.base.exact_match is not None
    assert evaluation.base.exact_match <= 0.02
    assert evaluation.adapter.exact_match is not None
    assert evaluation.adapter.exact_match >= 0.9
