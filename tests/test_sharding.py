"""How the default tests are divided between processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support import sharding
from tests.support.project import ROOT


@pytest.mark.parametrize("argument", ["tests/test_floors.py", "tests/test_floors.py::test_relative_imports"])
def test_a_single_file_needs_no_workers(argument: str) -> None:
    assert sharding.num_workers([argument]) == 0


@pytest.mark.parametrize("arguments", [["tests"], ["tests/test_floors.py", "tests/test_docs.py"]])
def test_folders_and_several_files_use_workers(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, workers in ((1, 1), (3, 3), (192, sharding.MAX_WORKERS)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, count=usable: set(range(count)), raising=False)
        assert sharding.num_workers(arguments) == workers


def test_a_file_goes_to_one_worker_and_so_do_all_tests_of_the_session_server() -> None:
    config = SimpleNamespace(getvalue=lambda _: ["2*popen"], getoption=lambda _: 2, option=SimpleNamespace())
    scope = sharding.Scheduling(config)._split_scope
    assert scope("tests/test_docs.py::test_a[x::y]") == "tests/test_docs.py"
    assert scope("tests/e2e/stateful/test_stateful.py::test_b") == "tests/e2e/stateful/test_stateful.py"
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/e2e").glob("test_*.py")]
    assert len(files) > 1
    assert {scope(f"{file}::test_c") for file in files} == {"tests/e2e"}


@pytest.mark.skipif(not sharding.IN_WORKER, reason="a run without workers uses all processors")
def test_a_worker_computes_on_one_thread() -> None:
    assert torch.get_num_threads() == 1
