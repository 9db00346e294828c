"""Every format is recognised. Every bad row is reported with its line and the reason."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import DatasetInvalid, DatasetUnreadable
from adapters.training.dataset import read_dataset
from adapters.training.file_kind import HEAD_BYTES

USER = {"role": "user", "content": "Hello?"}
ASSISTANT = {"role": "assistant", "content": "Hi."}
TEXT_PART = {"type": "text", "text": "Hi"}
GOOD = {"messages": [USER, ASSISTANT]}
PLAIN = [USER, ASSISTANT]


def written(folder: Path, *rows: Any) -> Path:
    """Write a file with one line for each row. Bytes are written unchanged."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path = folder / "train.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def problems(path: Path) -> list[tuple[int, str]]:
    with pytest.raises(DatasetInvalid) as raised:
        read_dataset(path)
    return [(problem.line, problem.reason) for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("OpenAI chat", GOOD, PLAIN),
        (
            "OpenAI chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, ASSISTANT]},
            PLAIN,
        ),
        ("prompt/completion", {"prompt": "Hello?", "completion": "Hi."}, PLAIN),
        ("prompt/completion", {"prompt": [USER], "completion": [ASSISTANT]}, PLAIN),
        ("Alpaca", {"instruction": "Hello?", "input": "", "output": "Hi."}, PLAIN),
        (
            "Alpaca",
            {"instruction": "Say", "input": "hi", "output": "Hi.", "system": "S", "history": [["a", "b"]]},
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "Say\nhi"},
                {"role": "assistant", "content": "Hi."},
            ],
        ),
        (
            "ShareGPT",
            {
                "system": "S",
                "conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}],
            },
            [{"role": "system", "content": "S"}, *PLAIN],
        ),
    ],
)
def test_formats_are_detected_and_become_chat(
    tmp_path: Path, name: str, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    dataset = read_dataset(written(tmp_path, row))
    assert dataset.format == name
    assert [(one.line, one.messages) for one in dataset.rows] == [(1, messages)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8 (byte 0)"),
        (b"", "is empty"),
        (b"3", "is not a JSON object"),
        (b"[" * 100_000, "is nested too deep"),
        (b'{"\\ud800": 1}', "half of a surrogate pair"),
        (b'{"messages": [], "messages": []}', "the key 'messages' occurs twice"),
        ({"text": "x"}, "has the fields text, but needs those of one format"),
        ({"prompt": "a", "completion": "b"}, "is a prompt/completion row, but the file began with OpenAI"),
        ({"messages": "x"}, "messages must be a list, not a text"),
        ({"messages": []}, "has no assistant message"),
        ({"messages": [3]}, "messages[0] must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role must be one of"),
        ({"messages": [{"role": [], "content": "x"}]}, "messages[0].role must be one of"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content must be a text, not null"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1].content is empty"),
        ({"messages": [{"role": "user", "content": []}, ASSISTANT]}, "content must be a text, not a list"),
        (
            {"messages": [{"role": "user", "content": [TEXT_PART, {"type": "image_url"}]}, ASSISTANT]},
            "messages[0].content[1] must be a text part, not type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": ["Hi"]}, ASSISTANT]},
            "messages[0].content[0] must be a text part, not a text",
        ),
        ({"messages": [USER, {**ASSISTANT, "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "messages[1] has tool_calls"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "nothing to learn from"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "messages[1].weight must be 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, "messages[0].weight must be 0 or 1"),
        ({"messages": [ASSISTANT]}, "before any user message"),
        ({"messages": [USER, ASSISTANT, USER]}, "ends with a user message"),
        ({"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]}, "not the first"),
        ({**GOOD, "tools": [{}]}, "has 'tools', which cannot be trained on"),
    ],
)
def test_a_bad_row_is_named_by_line_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    ((line, found),) = problems(written(tmp_path, GOOD, row, GOOD))
    assert line == 2
    assert reason in found


def test_every_bad_row_is_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid) as raised:
        read_dataset(written(tmp_path, GOOD, *[{"messages": []}] * 600))
    error = raised.value
    assert (error.count, len(error.problems)) == (600, DatasetInvalid.MAX_KEPT)
    assert str(error).startswith("train.jsonl has 600 rows that cannot be used: line 2 has no assistant")
    assert str(error).endswith("and 590 more.")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DatasetUnreadable, match=r'train\.jsonl has no rows; .*"messages"'):
        read_dataset(written(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnreadable, match=r"^none\.jsonl does not exist \(.*none\.jsonl\)"):
        read_dataset(tmp_path / "none.jsonl")
    with pytest.raises(DatasetUnreadable, match="is a folder"):
        read_dataset(tmp_path)


ROW_BYTES = json.dumps(GOOD).encode() + b"\n"


def test_a_long_first_row_is_one_line(tmp_path: Path) -> None:
    long = {"messages": [USER, {"role": "assistant", "content": ", " * 5000}]}
    assert len(read_dataset(written(tmp_path, long)).rows) == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(ROW_BYTES, mtime=0), "compressed with gzip; unpack it"),
        (b"PK\x03\x04...", "ZIP archive"),
        (b"PAR1...", "Parquet .*to_json"),
        (ROW_BYTES.decode().encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (ROW_BYTES.decode().encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        (ROW_BYTES.decode().encode("utf-32"), "UTF-32 text; save it as UTF-8"),
        (b"prompt,completion\nHello?,Hi.\n", 'CSV; give one JSON object on each line, such as {"messages"'),
        (b'\xef\xbb\xbf"Question";"Answer"\n', "CSV; "),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n", "HTML"),
        (json.dumps(GOOD, indent=1).encode(), "spread over several lines"),
        (b"\0" * 5000, "binary data"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetUnreadable, match=rf"^train\.jsonl is .*{what}"):
        read_dataset(path)


def test_a_first_row_longer_than_the_examined_head_is_a_row(tmp_path: Path) -> None:
    row = json.dumps({"messages": [USER, {"role": "assistant", "content": "," * 2 * HEAD_BYTES}]})
    assert len(read_dataset(written(tmp_path, row.encode())).rows) == 1


def test_empty_lines_at_the_end_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"", b"")
    assert len(read_dataset(path).rows) == 1


def test_one_json_array_is_read_with_the_lines_of_its_items(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps([GOOD, {"messages": []}, GOOD, []], indent=1).encode())
    lines = path.read_text().splitlines()
    begins = [number for number, line in enumerate(lines, 1) if line in (" {", " []")]
    found = problems(path)
    assert [line for line, _ in found] == [begins[1], begins[3]]
    assert [row.line for row in read_dataset(written(tmp_path, [GOOD, GOOD])).rows] == [1, 1]


def test_a_broken_array_is_refused_whole(tmp_path: Path) -> None:
    ((line, reason),) = problems(written(tmp_path, b"[", json.dumps(GOOD).encode()))
    assert (line, reason[:11]) == (1, "is not JSON")


def test_weight_zero_is_context_only(tmp_path: Path) -> None:
    row = {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]}
    (read,) = read_dataset(written(tmp_path, row)).rows
    assert read.context_only == {1}


def test_unused_fields_are_counted_and_the_hash_covers_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, {**GOOD, "id": 1}, {**GOOD, "id": 2, "source": "x"})
    dataset = read_dataset(path)
    assert dataset.unused_fields == {"id": 2, "source": 1}
    assert dataset.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_reading_data_imports_no_torch() -> None:
    script = "import sys, adapters.training.dataset; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("OpenAI chat", {"conversations": PLAIN}, PLAIN),
        (
            "OpenAI chat",
            {"conversations": PLAIN, "system": "S"},
            [{"role": "system", "content": "S"}, *PLAIN],
        ),
        ("OpenAI chat", {"messages": [{"from": "human", "value": "Hello?"}, ASSISTANT]}, PLAIN),
        ("prompt/completion", {"prompt": [{"from": "human", "value": "Hello?"}], "completion": "Hi."}, PLAIN),
        (
            "OpenAI chat",
            {"messages": [{"role": "developer", "content": "S"}, *PLAIN]},
            [{"role": "system", "content": "S"}, *PLAIN],
        ),
        (
            "OpenAI chat",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": word} for word in "ab"]},
                    ASSISTANT,
                ]
            },
            [{"role": "user", "content": "a\nb"}, ASSISTANT],
        ),
    ],
)
def test_messages_are_recognised_by_their_fields(
    tmp_path: Path, name: str, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    dataset = read_dataset(written(tmp_path, row))
    assert (dataset.format, dataset.rows[0].messages) == (name, messages)


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_weight_of_zero_is_context_wherever_messages_are(tmp_path: Path, field: str) -> None:
    turns = [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]
    assert read_dataset(written(tmp_path, {field: turns})).rows[0].context_only == {1}


def test_assistant_turns_in_a_prompt_are_context(tmp_path: Path) -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert read_dataset(written(tmp_path, row)).rows[0].context_only == {1}


def test_unused_fields_are_counted_at_every_level(tmp_path: Path) -> None:
    part = {"type": "text", "text": "Hello?", "cache_control": {"type": "ephemeral"}}
    named = {"role": "user", "name": "ada", "content": [part, part]}
    rows = [
        {"messages": [named, named, {**ASSISTANT, "refusal": None, "tool_calls": []}], "id": 1, "tools": []},
        {
            "messages": [{**USER, "thinking": "no answer"}, {**ASSISTANT, "thinking": 3, "weight": 1}],
            "id": None,
        },
    ]
    dataset = read_dataset(written(tmp_path, *rows))
    assert dataset.unused_fields == {
        "id": 1,
        "messages[].content[].cache_control": 1,
        "messages[].name": 1,
        "messages[].thinking": 1,
    }
    assert dataset.reasoning == 0


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_kept_and_reported_if_the_base_does_not_support_it(tmp_path: Path, name: str) -> None:
    dataset = read_dataset(written(tmp_path, {"messages": [USER, {**ASSISTANT, name: "Greet."}]}, GOOD))
    assert dataset.rows[0].messages[1] == ASSISTANT | {"reasoning_content": "Greet."}
    assert dataset.unused_by(takes_reasoning=True) == {}
    assert dataset.unused_by(takes_reasoning=False) == {"messages[].reasoning_content": 1}


def test_with_two_reasonings_the_first_is_rendered_and_the_other_reported(tmp_path: Path) -> None:
    answer = {**ASSISTANT, "reasoning_content": "Greet.", "thinking": "Greet.", "reasoning": "Else."}
    dataset = read_dataset(written(tmp_path, {"messages": [USER, answer]}))
    assert dataset.unused_fields == {"messages[].reasoning": 1}
    assert problems(
        written(tmp_path, {"messages": [USER, {**answer, "thinking": "\ud800", "reasoning_content": None}]})
    )
