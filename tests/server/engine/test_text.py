"""Text that is streamed token by token: split characters, stop strings, exact bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.answer import StreamedAnswer
from server.engine.engine import Output
from server.engine.interface import Delta
from server.engine.sampling_params import SamplingParams
from server.engine.stop_strings import StopScanner
from server.engine.tokenizer import Tokenizer
from tests.support.tiny_models import tiny_tokenizer

FAST = tiny_tokenizer()
TOKENIZER = Tokenizer(FAST, len(FAST), frozenset({FAST.eos_token_id}))


def _deltas(tokens: list[int], reason: str = "length", **params: object) -> list[Delta]:
    answer = StreamedAnswer(0, SamplingParams(max_tokens=len(tokens), **params), TOKENIZER)  # type: ignore[arg-type]
    last = len(tokens) - 1
    return [
        answer.push(Output("r", 0, token, reason=reason if i == last else None))  # type: ignore[arg-type]
        for i, token in enumerate(tokens)
    ]


@given(st.text(alphabet="aeiou lmn\u00e9\u4e16\U0001f600", max_size=40))
def test_streamed_pieces_add_up_and_never_split_a_character(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    deltas = _deltas(tokens) if tokens else []
    assert "".join(delta.text for delta in deltas) == text
    assert not any("\ufffd" in delta.text for delta in deltas)


@given(st.text(alphabet="aeiou lmn\u00e9\u4e16\U0001f600", min_size=1, max_size=40))
def test_the_bytes_of_tokens_add_up(text: str) -> None:
    assert b"".join(TOKENIZER.piece(token)[1] for token in TOKENIZER.encode(text)) == text.encode()


def test_an_answer_cut_inside_a_character_shows_that() -> None:
    tokens = TOKENIZER.encode("a\U0001f600")[:-1]
    assert "".join(delta.text for delta in _deltas(tokens)).startswith("a\ufffd")


def test_the_stop_token_is_not_part_of_the_text() -> None:
    tokens = TOKENIZER.encode("lane")
    deltas = _deltas([*tokens, FAST.eos_token_id], reason="stop", skip_special_tokens=False)
    assert "".join(delta.text for delta in deltas) == "lane"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason is None


def test_special_tokens_in_the_middle_are_left_out_unless_asked_for() -> None:
    tokens = [*TOKENIZER.encode("la"), FAST.eos_token_id, *TOKENIZER.encode("ne")]
    assert "".join(d.text for d in _deltas(tokens)) == "lane"
    assert "".join(d.text for d in _deltas(tokens, skip_special_tokens=False)) == f"la{FAST.eos_token}ne"


def test_a_stop_string_across_tokens_ends_the_answer_before_it() -> None:
    tokens = TOKENIZER.encode("aaaa nnnn eeee")
    deltas = []
    answer = StreamedAnswer(0, SamplingParams(max_tokens=99, stop=("n e",)), TOKENIZER)
    for token in tokens:
        deltas.append(answer.push(Output("r", 0, token)))
        if deltas[-1].finish_reason:
            break
    assert "".join(delta.text for delta in deltas) == "aaaa nnn"
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop_reason == "n e"


def test_stop_strings_are_ignored_before_min_tokens() -> None:
    tokens = TOKENIZER.encode("anananan")
    deltas = _deltas(tokens, stop=("n",), min_tokens=len(tokens))
    assert all(delta.finish_reason is None for delta in deltas[:-1])


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), max_size=30),
)
def test_stop_strings_are_found_across_any_tokens(text: str, stops: list[str], cuts: list[int]) -> None:
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    scanner = StopScanner(tuple(stops))
    shown = ""
    for piece in [*pieces, rest]:
        scan = scanner.push(piece)
        shown += scan.text
        if scan.stop is not None:
            break
    else:
        assert shown + scanner.finish() == text
        assert not any(stop in text for stop in stops)
        return
    assert scan.stop in stops
    assert text.startswith(shown + scan.stop)
    assert not any(stop in shown for stop in stops), "text after a stop string was streamed"


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    scanner = StopScanner(("END",))
    assert scanner.push("the E").text == "the "
    assert scanner.push("nd").text == "End"
