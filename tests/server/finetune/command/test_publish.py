"""An adapter is published in one step, and replaces an older one without a gap."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from adapters import fsync
from adapters.errors import AdapterExists, AdapterNameInvalid
from server.finetune.command import publish as module
from server.finetune.command.provenance import Producer, Provenance
from server.finetune.command.publish import publish


def made(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_an_adapter_is_published_under_its_name_without_other_files(tmp_path: Path) -> None:
    out = tmp_path / "adapters"
    target = publish(made(tmp_path / "made", "new"), out, "acme")
    assert (target / "adapter_config.json").read_text() == "new"
    assert [path.name for path in out.iterdir()] == ["acme"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_older_version_is_replaced(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(module, "_rename", lambda *_: False)
    out = tmp_path / "adapters"
    publish(made(tmp_path / "old", "old"), out, "acme")
    publish(made(tmp_path / "new", "new"), out, "acme")
    assert (out / "acme" / "adapter_config.json").read_text() == "new"
    assert [path.name for path in out.iterdir()] == ["acme"]


def test_the_name_is_never_without_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "adapters"
    sources = [made(tmp_path / text, text) for text in ("one", "two")]
    publish(sources[0], out, "acme")
    missing: list[int] = []
    done = threading.Event()

    def watch() -> None:
        looks = 0
        while not done.is_set() or not looks:
            looks += 1
            if not (out / "acme").is_dir():
                missing.append(looks)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for round_ in range(30):
        publish(sources[round_ % 2], out, "acme")
    done.set()
    watcher.join()
    assert not missing


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "acme").write_text("mine")
    with pytest.raises(AdapterExists, match="not a folder"):
        publish(made(tmp_path / "made", "new"), tmp_path, "acme")
    assert (tmp_path / "acme").read_text() == "mine"


def test_a_name_cannot_lead_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(AdapterNameInvalid):
        publish(made(tmp_path / "made", "new"), tmp_path / "out", "../acme")


@pytest.fixture
def by(tmp_path: Path) -> Producer:
    return Producer(Provenance(tmp_path), "ftjob-2")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_job_replaces_only_results_of_jobs(
    tmp_path: Path, by: Producer, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(module, "_rename", lambda *_: False)
    out = tmp_path / "adapters"
    publish(made(tmp_path / "first", "first"), out, "acme", Producer(by.provenance, "ftjob-1"))
    publish(made(tmp_path / "second", "second"), out, "acme", by)
    assert by.provenance.job_of(out / "acme", "acme") == "ftjob-2"
    publish(made(tmp_path / "own", "own"), out, "acme")  # the operator's command may replace any folder
    with pytest.raises(AdapterExists, match="that no fine-tuning job has made"):
        publish(made(tmp_path / "third", "third"), out, "acme", by)
    assert (out / "acme" / "adapter_config.json").read_text() == "own"
    assert [path.name for path in out.iterdir()] == ["acme"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", ["nothing", "a job's"])
def test_a_folder_that_appears_at_the_last_moment_is_left(
    tmp_path: Path, by: Producer, can_exchange: bool, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(module, "_rename", lambda *_: False)
    out = tmp_path / "adapters"
    if before == "a job's":
        publish(made(tmp_path / "first", "first"), out, "acme", by)
    sync = fsync.sync_folder

    def come(staged: Path) -> None:
        sync(staged)
        shutil.rmtree(out / "acme", ignore_errors=True)
        made(out / "acme", "own")

    monkeypatch.setattr(module, "sync_folder", come)
    with pytest.raises(AdapterExists, match="that no fine-tuning job has made"):
        publish(made(tmp_path / "new", "new"), out, "acme", by)
    assert (out / "acme" / "adapter_config.json").read_text() == "own"
    assert [path.name for path in out.iterdir()] == ["acme"]


def test_a_fine_tuned_model_has_its_own_folder(tmp_path: Path, by: Producer) -> None:
    target = publish(made(tmp_path / "made", "new"), tmp_path / "out", "ft:lab/base:acme:1", by)
    assert target.name == "ft_3alab_2fbase_3aacme_3a1"
    assert by.provenance.job_of(target, "ft:lab/base:acme:1") == "ftjob-2"
