"""Uploads are complete or absent. A child process checks them, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from adapters.errors import DatasetInvalid
from server.finetune.jobs.check import check
from server.finetune.jobs.database import Database
from server.finetune.jobs.errors import FileNotKnown
from server.finetune.jobs.files import ABANDONED_AFTER, TRAINING, Files
from server.http.files import file_object
from tests.server.finetune.jobs.room import Room

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}


def test_files_of_a_crash_are_removed_later(room: Room) -> None:
    kept = room.upload()
    folder = room.home / "files"
    old = time.time() - ABANDONED_AFTER - 1
    for name in (".upload-1", "file-without-a-row"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (old, old))
    (folder / ".upload-2").write_bytes(b"of another server, which is writing it now")
    os.utime(room.files.path(kept.id), (old, old))
    room.files.sweep()
    assert {path.name for path in folder.iterdir()} == {kept.id, ".upload-2"}


def test_a_discarded_upload_leaves_nothing(room: Room) -> None:
    upload = room.files.begin()
    upload.write(b"x" * 10_000)
    upload.discard()
    assert list((room.home / "files").iterdir()) == []
    with pytest.raises(FileNotKnown):
        room.files.get("file-1")


FULL = """
import resource, sys
from pathlib import Path
from server.finetune.jobs.errors import StorageFull
from server.finetune.jobs.files import Upload
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
upload = Upload(Path(sys.argv[1]))
try:
    for _ in range(64):
        upload.write(b"x" * 65536)
    upload.finish()
except StorageFull as error:
    print(error)
upload.discard()
"""


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """Runs in a process that may only write files of up to 1 MiB. To it the disk is then full."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "upload")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "disk is full" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_rows_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_text(f"{json.dumps(ROW)}\n" * 3)
    assert check(path, "train.jsonl").rows == 3
    path.write_text(f"{json.dumps(ROW)}\nno\n{json.dumps(ROW)}\n[]\n")
    with pytest.raises(DatasetInvalid, match=r"train\.jsonl has 2 rows .*line 2 .*line 4 ") as refused:
        check(path, "train.jsonl")
    assert [problem.line for problem in refused.value.problems] == [2, 4]
    assert "stored" not in str(refused.value)


def test_unused_fields_are_kept_with_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    question, answer = ROW["messages"]
    row = {"messages": [{**question, "name": "ada"}, {**answer, "thinking": "Hm."}], "id": 1}
    reported = {}
    for takes in (False, True):
        database = Database(tmp_path / f"{takes}.sqlite3")
        files = Files(database, tmp_path / "files", partial(check, takes_reasoning=takes))
        upload = files.begin()
        upload.write(json.dumps(row).encode())
        kept = files.keep(upload, "train.jsonl", TRAINING)
        reported[takes] = file_object(files.get(kept.id))["unused_fields"]
        database.close()
    assert reported[True] == {"id": 1, "messages[].name": 1}
    assert reported[False] == reported[True] | {"messages[].reasoning_content": 1}
    logged = [vars(record)["fields"] for record in caplog.records if record.message == "unused field"]
    assert ("messages[].name", 1) in [(fields["field"], fields["rows"]) for fields in logged]


def test_a_check_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.finetune.jobs.check.__name__", "no.such.module")
    with pytest.raises(DatasetInvalid, match=r"could not be checked: .*No module named"):
        check(tmp_path / "stored", "train.jsonl")


TINY_DISK = """
import sys
from pathlib import Path
from server.finetune.jobs.check import Checked
from server.finetune.jobs.database import Database
from server.finetune.jobs.errors import StorageFull
from server.finetune.jobs.files import TRAINING, Files
from server.finetune.jobs.store import Jobs, JobRequest

home = Path(sys.argv[1])
database = Database(home / "state.sqlite3")
files = Files(database, home / "files", check=lambda *_: Checked("chat", 1))
jobs = Jobs(database, lambda: None)
upload = files.begin()
upload.write(b"x" * 65536)
kept = files.keep(upload, "a.jsonl", TRAINING)
job = jobs.add(jobs.draft(JobRequest("base", kept.id)))

upload = files.begin()
try:
    while True:
        upload.write(b"x" * 65536)
except StorageFull:
    upload.discard()
    print("refused")
with (home / "somebody's").open("wb", buffering=0) as other:
    try:
        while other.write(bytes(4096)):
            pass
    except OSError:
        pass
try:
    while True:
        jobs.add(jobs.draft(JobRequest("base", kept.id)))
except StorageFull:
    print("full")
database.close()
database = Database(home / "state.sqlite3")
files, jobs = Files(database, home / "files"), Jobs(database, lambda: None)
for each in jobs.list(None, 10_000).rows:
    jobs.cancel(each.id)
files.delete(kept.id)
print(len(files.list(None, 10, False, None).rows), "left")
"""
NAMESPACE = ["unshare", "--user", "--mount", "--map-root-user"]


def _may_mount(folder: Path) -> bool:
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run([*NAMESPACE, *mount], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_on_a_full_disk_jobs_are_cancelled_and_files_deleted(tmp_path: Path) -> None:
    if not _may_mount(tmp_path):
        pytest.skip("a small disk cannot be mounted here")
    script = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec {sys.executable} - {tmp_path}"
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", script], input=TINY_DISK, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["refused", "full", "0 left"], done.stderr
