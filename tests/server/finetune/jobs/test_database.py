"""The database file: versions, transactions, and a full disk."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy import select

from server.finetune.jobs import database as database_module
from server.finetune.jobs.database import MIGRATIONS, Database, Job, StoredFile
from server.finetune.jobs.errors import StateBusy, StateUnusable, StorageFull


def a_file(number: int, filename: str = "a") -> StoredFile:
    return StoredFile(
        id=f"file-{number}",
        bytes=1,
        created_at=1.0,
        filename=filename,
        purpose="p",
        sha256="",
        format=None,
        rows=None,
    )


def add(database: Database, number: int) -> None:
    with database.write() as session:
        session.add(a_file(number))


def count(database: Database) -> int:
    with database.read() as session:
        return len(session.scalars(select(StoredFile)).all())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state folder.sqlite3"


def test_a_reopened_database_has_its_rows(path: Path) -> None:
    with Database(path).write() as session:
        session.add(a_file(1))
    assert count(Database(path)) == 1
    with sqlite3.connect(path) as plain:
        assert plain.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert plain.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_tables_of_the_first_version_are_migrated(path: Path) -> None:
    with Database(path).write() as session:
        session.add(a_file(1))
    with sqlite3.connect(path) as plain:
        plain.execute("ALTER TABLE files DROP COLUMN unused_fields")
        plain.execute("PRAGMA user_version = 1")
    database = Database(path)
    add(database, 2)
    with database.read() as session:
        assert [file.unused_fields for file in session.scalars(select(StoredFile))] == [{}, {}]


def test_a_failed_transaction_changes_nothing(path: Path) -> None:
    database = Database(path)

    def fail() -> None:
        with database.write() as session:
            session.add(a_file(1))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert count(database) == 0


def test_writers_wait_for_each_other(path: Path) -> None:
    databases = [Database(path), Database(path)]  # two servers may open the same file

    def add(database: Database, start: int) -> None:
        for number in range(start, start + 25):
            with database.write() as session:
                seen = len(
                    session.scalars(select(StoredFile)).all()
                )  # the rows cannot change between this read and the write
                session.add(a_file(number, filename=str(seen)))

    threads = [threading.Thread(target=add, args=(databases[n % 2], 100 * n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with databases[0].read() as session:
        seen = [int(each) for each in session.scalars(select(StoredFile.filename).order_by(StoredFile.seq))]
    assert seen == list(range(100))


def test_a_database_of_a_newer_manylora_is_refused(path: Path) -> None:
    with sqlite3.connect(path) as plain:
        plain.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StateUnusable, match="newer manylora"):
        Database(path)


@pytest.mark.parametrize("content", [b"this is no database" * 100, None])
def test_a_file_that_is_not_a_database_is_refused(path: Path, content: bytes | None) -> None:
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(StateUnusable, match="cannot be used"):
        Database(path)


def test_a_full_disk_is_named_and_loses_nothing(path: Path) -> None:
    database = Database(path)
    with database.write() as session:
        session.add(a_file(1))
        pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
        session.connection().exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull, match="full"), database.write() as session:
        session.add(a_file(2, filename="x" * 100_000))
    assert count(database) == 1


def test_a_database_that_another_process_locks_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.05)
    path = tmp_path / "state.sqlite3"
    database = Database(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateBusy, match="try again"):
        add(database, 1)
    with database.read() as session:
        assert session.scalars(select(Job)).all() == []
    other.close()
    database.close()
