"""The streamed form: the split of its bytes does not change the result, and errors name the field."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.http import fields
from server.http.multipart import MAX_FIELD_BYTES, MAX_OTHER_BYTES, Form

BOUNDARY = "frontier"


def part(disposition: str, content: bytes) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode()
    return head + content + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def read(data: bytes, cuts: list[int] | None = None) -> tuple[Form, bytes]:
    form, file = Form(BOUNDARY.encode(), fields.FILE), b""
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or []), len(data)]
    for start, end in pairwise(edges):
        file += form.feed(data[start:end])
    return form, file


@given(
    st.binary(max_size=200) | st.sampled_from([b"\r\n--frontie", b"--frontier", b"\r\n\r\n--", b"\r\n" * 9]),
    st.text("abcü._-;= ", min_size=1, max_size=20).map(lambda name: f"a{name}z"),
    st.lists(st.integers(0, 1000), max_size=8),
)
def test_the_form_may_be_split_anywhere(content: bytes, filename: str, cuts: list[int]) -> None:
    if f"\r\n--{BOUNDARY}".encode() in b"\r\n" + content + b"\r\n":
        content = content.replace(b"-", b"")
    data = body(part('name="purpose"', b"fine-tune"), part(f'name="file"; filename="{filename}"', content))
    form, file = read(data, cuts)
    assert (file, form.fields, form.complete) == (content, {"purpose": "fine-tune"}, True)
    assert form.filename == filename


@given(st.binary(max_size=300), st.lists(st.integers(0, 1000), max_size=4))
def test_any_bytes_end_in_a_form_or_a_refusal(data: bytes, cuts: list[int]) -> None:
    try:
        form, _ = read(f"--{BOUNDARY}".encode() + data, cuts)
    except InvalidRequest:
        return
    assert not form.complete or form.fields or form.filename or data.startswith(b"--")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([part('name="colour"', b"red")], "colour"),
        ([part('name="expires_after[seconds]"', b"3600")], "expires_after[seconds]"),
        ([part('name="file"; filename="a"', b"1"), part('name="file"; filename="b"', b"2")], "file"),
        ([part('name="purpose"', b"x" * (MAX_FIELD_BYTES + 1))], "purpose"),
    ],
)
def test_unexpected_parts_are_named(parts: list[bytes], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(body(*parts))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("../../etc/passwd", "passwd"), ("C:\\data\\a.jsonl", "a.jsonl"), ("", "upload"), ("a\x07b", "ab")],
)
def test_filenames_are_only_names(sent: str, kept: str) -> None:
    form, _ = read(body(part(f'name="file"; filename="{sent}"', b"")))
    assert form.filename == kept


@pytest.mark.parametrize(
    "parts",
    [
        [part('name="purpose"', b"x")] * (MAX_OTHER_BYTES // 50),
        [part('name="purpose"', b"x"), part('name="file"; filename="a"', b"1"), b"", b"x" * MAX_OTHER_BYTES],
    ],
    ids=["many fields", "much behind the file"],
)
def test_the_parts_besides_the_file_are_bounded(parts: list[bytes]) -> None:
    data = body(*parts) if parts[-1].startswith(b"--") else body(*parts[:-1]) + parts[-1]
    with pytest.raises(InvalidRequest, match="outside its file"):
        read(data, list(range(0, len(data), 4096)))


def test_a_field_that_is_not_served_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match="files are stored until they are deleted") as caught:
        read(body(part('name="expires_after[anchor]"', b"created_at")), [])
    assert caught.value.param == "expires_after[anchor]"


def test_a_large_file_is_accepted() -> None:
    content = b"y" * (4 * MAX_OTHER_BYTES)
    form, file = read(body(part('name="file"; filename="a"', content)), list(range(0, len(content), 9999)))
    form.finish()
    assert file == content


def test_a_form_that_does_not_end() -> None:
    form, _ = read(body(part('name="file"; filename="a"', b"1"))[:-4])
    with pytest.raises(InvalidRequest, match="last boundary"):
        form.finish()
