from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.bench.serving.sse import SSEDecoder

LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5)


@given(EVENTS, st.sampled_from(["\n", "\r\n"]), st.data())
def test_events_survive_any_cut(events: list[list[str]], end: str, data: st.DataObject) -> None:
    stream = "".join(
        f": comment{end}" + "".join(f"data: {line}{end}" for line in lines) + end for lines in events
    )
    raw = stream.encode()
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=8).map(sorted))
    decoder = SSEDecoder()
    found = []
    for begin, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        found += decoder.feed(raw[begin:stop])
    assert found == ["\n".join(lines).encode() for lines in events]


def test_an_event_without_its_empty_line_is_not_given() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: {}\n") == []
    assert decoder.feed(b"\n") == [b"{}"]


def test_other_fields_and_a_missing_space_are_fine() -> None:
    assert SSEDecoder().feed(b"event: x\nid: 3\ndata:{}\nretry: 5\n\n\n\n") == [b"{}"]
