"""Who made a folder: the results of jobs are distinguished from all other folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from server.finetune.command.provenance import MARK, Provenance


@pytest.fixture
def provenance(tmp_path: Path) -> Provenance:
    (tmp_path / "home").mkdir()
    return Provenance(tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path, provenance: Provenance) -> Path:
    folder = tmp_path / "acme"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    provenance.mark(folder, "acme", "ftjob-1")
    return folder


def test_a_jobs_folder_belongs_to_the_job(provenance: Provenance, folder: Path) -> None:
    assert provenance.job_of(folder, "acme") == "ftjob-1"
    assert (
        Provenance(provenance.home).job_of(folder.rename(folder.with_name(".acme.tmp")), "acme") == "ftjob-1"
    )


def _edit(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"others!")


def _lose_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _lose_mark(folder: Path) -> None:
    (folder / MARK).unlink()


def _forge(folder: Path) -> None:
    mark = json.loads((folder / MARK).read_text())
    (folder / MARK).write_text(json.dumps(mark | {"state": "another server"}))


def _garble(folder: Path) -> None:
    (folder / MARK).write_text("[" * 100_000)


def _no_object(folder: Path) -> None:
    (folder / MARK).write_text("[1]")


def _pipe(folder: Path) -> None:
    (folder / MARK).unlink()
    os.mkfifo(folder / MARK)


def _link(folder: Path) -> None:
    (folder / MARK).rename(folder.with_name("mark"))
    (folder / MARK).symlink_to(folder.with_name("mark"))


def _linked_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


CHANGES = [_edit, _lose_weights, _lose_mark, _forge, _garble, _no_object, _pipe, _link, _linked_folder]


@pytest.mark.parametrize("change", CHANGES)
def test_every_other_folder_belongs_to_the_operator(
    provenance: Provenance, folder: Path, change: Callable[[Path], None]
) -> None:
    change(folder)
    assert provenance.job_of(folder, "acme") is None


def test_a_copy_under_another_name_or_on_another_server_belongs_to_the_operator(
    provenance: Provenance, folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(folder, copy)
    assert provenance.job_of(copy, "mine") is None
    other = Provenance(tmp_path / "other")
    other.home.mkdir()
    assert other.job_of(folder, "acme") is None
    assert provenance.job_of(tmp_path / "nothing", "acme") is None
