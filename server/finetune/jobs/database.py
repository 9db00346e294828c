"""The SQLite database of the state folder: its tables, and transactions that survive ``kill -9``.

Every call blocks, so do not call it on the event loop. Several servers may share one file.
"""

from __future__ import annotations

import json
import logging
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from sqlalchemy import JSON, Connection, Engine, ForeignKey, String, create_engine, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column
from sqlalchemy.orm.attributes import set_committed_value

from server.finetune.jobs.disk_reserve import DiskReserve
from server.finetune.jobs.errors import DISK_FULL, StateBusy, StateUnusable, StorageFull

T = TypeVar("T")
logger = logging.getLogger("manylora.jobs")

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)
BUSY_SECONDS = 30
"""Seconds that a transaction waits for the transaction of another process."""

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
UNFINISHED: tuple[Status, ...] = ("queued", "running", "paused")
Level = Literal["info", "warn", "error"]
JOB_DAMAGED = "job_damaged"
"""The code of the error of a job whose row is damaged."""


class Table(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """A row as a plain object. Change it only within its transaction. ``seq`` is the order of insertion."""

    # Status and level are plain strings for the database: an unknown one must not make a row unreadable.
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[str]: JSON,
        Status: String,
        Level: String,
    }


class StoredFile(Table):
    """An uploaded file or a result of a job. Its bytes are in ``files/<id>`` of the state folder.

    Attributes:
        sha256: of the bytes, in hex.
        format: the format of its training rows; None for results.
        unused_fields: the number of rows that have the field, for each field that training does not use.
    """

    __tablename__ = "files"

    seq: Mapped[int] = mapped_column(primary_key=True, init=False)
    id: Mapped[str] = mapped_column(unique=True)
    bytes: Mapped[int]
    created_at: Mapped[float]
    filename: Mapped[str]
    purpose: Mapped[str]
    sha256: Mapped[str]
    format: Mapped[str | None]
    rows: Mapped[int | None]
    unused_fields: Mapped[dict[str, Any]] = mapped_column(default_factory=dict, server_default="{}")


class Job(Table):
    """One fine-tuning job.

    Attributes:
        status: the status that the job should have. The runner starts or stops the training process.
        hyperparameters: OpenAI's three, as given or "auto".
        recipe: the fields that OpenAI does not have, as given.
        tags: OpenAI's ``metadata``.
        fine_tuned_model: the name of the adapter.
        error: OpenAI's ``error``. A job whose row is damaged has one with the code ``JOB_DAMAGED``.
        child: ``pid:start time`` of the training process; "" until it is known; None if there is no process
            whose end has to be recorded.
        deaths: the number of processes that were killed since the last checkpoint.
        metrics_read: the bytes of ``metrics.jsonl`` that have been recorded as events.
        seconds: for which training processes have run.
    """

    __tablename__ = "jobs"

    seq: Mapped[int] = mapped_column(primary_key=True, init=False)
    id: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[float]
    model: Mapped[str]
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    fine_tuned_model: Mapped[str] = mapped_column(index=True)
    seed: Mapped[int]
    hyperparameters: Mapped[dict[str, Any]]
    recipe: Mapped[dict[str, Any]]
    tags: Mapped[dict[str, Any]]
    status: Mapped[Status] = mapped_column(index=True, default="queued")
    finished_at: Mapped[float | None] = mapped_column(default=None)
    estimated_finish: Mapped[float | None] = mapped_column(default=None)
    trained_tokens: Mapped[int | None] = mapped_column(default=None)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)
    result_files: Mapped[list[str]] = mapped_column(default_factory=list)
    child: Mapped[str | None] = mapped_column(index=True, default=None)
    deaths: Mapped[int] = mapped_column(default=0)
    metrics_read: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[float] = mapped_column(default=0.0)


class JobEvent(Table):
    """An event of a job.

    Attributes:
        kind: ``message``, ``metrics`` or ``checkpoint``.
    """

    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(primary_key=True, init=False)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[float]
    level: Mapped[Level]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    id: Mapped[str] = mapped_column(unique=True, default_factory=lambda: f"ftevent-{secrets.token_hex(12)}")


_DAMAGED = object()
"""Stands for JSON that cannot be parsed, until the row is loaded."""
_EMPTY: dict[str, Callable[[], Any]] = {
    "unused_fields": dict,
    "hyperparameters": dict,
    "recipe": dict,
    "tags": dict,
    "error": lambda: None,
    "result_files": list,
    "data": dict,
}
"""By JSON column: its value where the stored one is damaged."""


@event.listens_for(Table, "load", propagate=True)
def _replace_damaged(row: Table, _: object) -> None:
    """Make a row with damaged JSON readable. A job with such columns gets an ``error`` that names them."""
    lost = [name for name, empty in _EMPTY.items() if _is_damaged(row.__dict__.get(name), empty())]
    for name in lost:
        set_committed_value(row, name, _EMPTY[name]())
    names = ", ".join(lost)
    if lost and not isinstance(row, Job):
        fields = {"id": row.__dict__["id"], "columns": names}
        logger.warning("row is damaged in the state database", extra={"fields": fields})
    elif lost and row.__dict__["error"] is None:
        message = f"Fields of this job are damaged in the state database and are shown empty: {names}."
        set_committed_value(row, "error", {"code": JOB_DAMAGED, "message": message, "param": None})


def _is_damaged(value: Any, empty: Any) -> bool:
    return value is not None and not isinstance(value, dict if empty is None else type(empty))


def _parse_json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return _DAMAGED


def _create_tables(connection: Connection) -> None:
    Table.metadata.create_all(connection)


def _add_unused_fields(connection: Connection) -> None:
    columns = {row[1] for row in connection.exec_driver_sql("PRAGMA table_info(files)")}
    if "unused_fields" not in columns:  # an earlier version made the table
        connection.exec_driver_sql("ALTER TABLE files ADD COLUMN unused_fields JSON NOT NULL DEFAULT '{}'")


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_create_tables, _add_unused_fields)
"""Migration n makes version n + 1 of version n. ``PRAGMA user_version`` is a file's version."""


class Database:
    """Transactions on one file. Thread-safe.

    Attributes:
        reserve: disk space beside the file, for ``write_with_reserve``.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the database. Raises StateUnusable."""
        self._engine = create_engine(
            f"sqlite:///{path}", connect_args={"timeout": BUSY_SECONDS}, json_deserializer=_parse_json
        )
        event.listen(self._engine, "connect", _on_connect)
        event.listen(self._engine, "begin", _on_begin)
        self._writing = self._engine.execution_options(begin="BEGIN IMMEDIATE")
        self.reserve = DiskReserve(path.with_name("reserve"))
        try:
            self._open(path)
        except SQLAlchemyError as error:
            raise StateUnusable(f"The database {path} cannot be used: {error.args[0]}.") from error
        self.reserve.ensure()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view of the database. Changes are not kept."""
        with self._session(self._engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """An exclusive transaction, which is on the disk at its end. Raises StorageFull, StateBusy."""
        try:
            with self._session(self._writing) as session, session.begin():
                yield session
        except OperationalError as error:
            if _is_full(error):
                raise StorageFull(DISK_FULL) from error
            if _code(error) == sqlite3.SQLITE_BUSY:
                message = f"Another process has held the state database for {BUSY_SECONDS} s; try again."
                raise StateBusy(message) from error
            raise

    def write_with_reserve(self, change: Callable[[Session], T]) -> T:
        """Run ``change``, which ends or deletes something, in a transaction. It also works on a full disk.

        On a full disk it uses the reserve. Call ``reserve.ensure`` when the deletion has freed space. Raises
        StorageFull if there is no reserve.
        """
        try:
            with self.write() as session:
                return change(session)
        except StorageFull:
            self.reserve.release()
            with self.write() as session:
                return change(session)

    def close(self) -> None:
        """Close the connections. The next transaction opens new ones."""
        self._engine.dispose()

    def _session(self, engine: Engine) -> Session:
        return Session(engine, expire_on_commit=False)

    def _open(self, path: Path) -> None:
        try:
            self._migrate(path)
        except OperationalError as error:  # a server must start on a full disk, so that files can be deleted
            if not _is_full(error):
                raise
            self.reserve.release()
            self._migrate(path)

    def _migrate(self, path: Path) -> None:
        with self._writing.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version > len(MIGRATIONS):
                raise StateUnusable(
                    f"The database {path} has version {version}; this manylora knows {len(MIGRATIONS)}. "
                    "Use the newer manylora, or another --home."
                )
            for migrate in MIGRATIONS[version:]:
                migrate(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _code(error: OperationalError) -> int | None:
    """SQLite's error code."""
    code: int | None = getattr(error.orig, "sqlite_errorcode", None)
    return code


def _is_full(error: OperationalError) -> bool:
    return _code(error) in _FULL


def _on_connect(connection: Any, _: object) -> None:
    connection.isolation_level = None  # ``_on_begin`` begins transactions, not the module sqlite3
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # answered requests survive a power cut
    connection.execute("PRAGMA foreign_keys = ON")


def _on_begin(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))
