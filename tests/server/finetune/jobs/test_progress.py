"""``metrics.jsonl`` while it grows: every line is read once, with any content."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.finetune.jobs.progress import METRICS, RESULT, MetricsLine, read_lines, read_result

NAMES = st.sampled_from(["event", "step", "loss", "time", "message"])
VALUES = st.none() | st.booleans() | st.floats() | st.integers(-9, 9) | st.text(max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(st.dictionaries(NAMES, VALUES), max_size=6),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_each_line_is_read_once(tmp_path: Path, rows: list[dict[str, object]], sizes: list[int]) -> None:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    file, offset, found, at = tmp_path / METRICS, 0, 0, 0
    file.write_bytes(b"")
    for size in [*sizes, len(data)]:
        with file.open("ab") as grown:
            grown.write(data[at : at + size])
        at += size
        lines, offset = read_lines(tmp_path, offset)
        found += len(lines)
        for line in lines:
            event = line.as_event("job")
            json.dumps(event.data, allow_nan=False)
            assert math.isfinite(event.created_at)
            assert line.estimated_finish() is None
    assert (found, offset) == (len(rows), len(data))


def test_an_incomplete_line_is_skipped(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(
        b'{"event": "st{"event": "note", "message": "hello"}\n{"event": "note"}\n[1]\n'
    )
    lines, _ = read_lines(tmp_path, 0)
    assert [line.event for line in lines] == ["note"]


def test_a_truncated_file_is_read_from_its_start(tmp_path: Path) -> None:
    assert read_lines(tmp_path, 0) == ([], 0)
    (tmp_path / METRICS).write_text('{"event": "start"}\n')
    lines, offset = read_lines(tmp_path, 1000)
    assert ([line.event for line in lines], offset) == (["start"], 19)


def test_the_time_left() -> None:
    assert MetricsLine({"event": "step", "time": 100.0, "eta_seconds": 5}).estimated_finish() == 105.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reason": 1}', "null", '{"status": "kept", "metrics": 3}'])
def test_a_broken_result_counts_as_none(tmp_path: Path, text: str) -> None:
    assert read_result(tmp_path) is None
    (tmp_path / RESULT).write_text(text)
    assert read_result(tmp_path) is None


def test_clients_do_not_see_the_servers_paths() -> None:
    line = MetricsLine(
        {"event": "end", "message": "The adapter is in /srv/jobs/1/adapter.", "path": "/srv/jobs/1"}
    )
    event = line.as_event("job")
    assert (event.message, event.data) == ("The adapter is trained", {})
