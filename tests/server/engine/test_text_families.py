"""For tokenizers of every family, streamed text equals one decode of all tokens."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.answer import StreamedAnswer
from server.engine.engine import Output
from server.engine.interface import Delta
from server.engine.sampling.sampler import RankedLogprobs
from server.engine.sampling_params import SamplingParams
from server.engine.tokenizer import Tokenizer
from tests.support.tokenizer_families import (
    BYTE_FALLBACK,
    BYTE_FALLBACK_CLASSES,
    BYTE_LEVEL_CLASSES,
    TOKENIZER_CLASSES,
    TOKENIZER_FAMILIES,
    TokenizerClass,
    TokenizerFamily,
    class_tokenizer,
    family_tokenizer,
)

Kind: TypeAlias = TokenizerFamily | TokenizerClass
_BYTES_FALL_BACK: tuple[Kind, ...] = (*BYTE_FALLBACK, *BYTE_FALLBACK_CLASSES)
_BYTES_ARE_TOKENS: tuple[Kind, ...] = ("byte-level", *BYTE_LEVEL_CLASSES, *_BYTES_FALL_BACK)
EVERY = pytest.mark.parametrize("family", [*TOKENIZER_FAMILIES, *TOKENIZER_CLASSES])
FALLBACK = pytest.mark.parametrize("family", _BYTES_FALL_BACK)
BYTES = pytest.mark.parametrize("family", _BYTES_ARE_TOKENS)


@cache
def tokenizer_of(family: Kind) -> tuple[Any, Tokenizer]:
    if family in TOKENIZER_CLASSES:
        fast = class_tokenizer(family)
    else:
        fast = family_tokenizer(cast(TokenizerFamily, family))
    return fast, Tokenizer(fast, len(fast), frozenset({fast.eos_token_id}))


def deltas(tokenizer: Tokenizer, tokens: list[int], **params: Any) -> list[Delta]:
    answer = StreamedAnswer(0, SamplingParams(max_tokens=len(tokens), **params), tokenizer)
    last = len(tokens) - 1
    ranked = RankedLogprobs(-0.5, (), ()) if "logprobs" in params else None
    return [
        answer.push(Output("r", 0, token, logprobs=ranked, reason="length" if i == last else None))
        for i, token in enumerate(tokens)
    ]


def streamed(tokenizer: Tokenizer, tokens: list[int], **params: Any) -> str:
    return "".join(delta.text for delta in deltas(tokenizer, tokens, **params))


def behind_a_prompt(fast: Any, tokens: list[int], skip: bool = True) -> str:
    """The text that the tokens add to a prompt, in one decode."""
    prompt = fast("tile", add_special_tokens=False)["input_ids"]
    decode = fast.backend_tokenizer.decode
    whole: str = decode([*prompt, *tokens], skip_special_tokens=skip)
    return whole[len(decode(prompt, skip_special_tokens=skip)) :]


def bytes_of(fast: Any, data: bytes, family: Kind) -> list[int]:
    if family not in _BYTES_FALL_BACK:
        alphabet = tokenizer_of(family)[1]._byte_of
        names = {byte: character for character, byte in alphabet.items()}
        return [fast.convert_tokens_to_ids(names[byte]) for byte in data]
    return [fast.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@EVERY
@settings(deadline=None)  # the first example builds the tokenizer
@given(
    text=st.text(alphabet="aeirst lmn.,'\n\u00e9\u4e16\U0001f600", min_size=1, max_size=30),
    skip=st.booleans(),
)
def test_streamed_text_equals_one_decode(family: Kind, text: str, skip: bool) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = fast(text, add_special_tokens=False)["input_ids"]
    tokens = [*tokens, fast.eos_token_id, *tokens]
    expected = behind_a_prompt(fast, tokens, skip)
    assert streamed(tokenizer, tokens, skip_special_tokens=skip) == expected
    assert tokenizer.decode(tokens, skip) == expected


@EVERY
@settings(deadline=None)
@given(data=st.data())
def test_no_sequence_of_tokens_fails(family: Kind, data: st.DataObject) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = data.draw(st.lists(st.integers(0, len(fast) + 3), min_size=1, max_size=30))
    stream = streamed(tokenizer, tokens, logprobs=0)
    assert stream == tokenizer.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in stream:
        assert stream == behind_a_prompt(fast, tokens)


@EVERY
def test_the_first_tokens_space_is_kept(family: Kind) -> None:
    fast, tokenizer = tokenizer_of(family)
    token = fast(" at", add_special_tokens=False)["input_ids"][0]
    (delta,) = deltas(tokenizer, [token], logprobs=0)
    assert delta.text.startswith(" ")
    assert " at".startswith(delta.text)
    assert delta.logprobs is not None
    assert delta.logprobs[0].token == delta.text
    assert delta.logprobs[0].token_bytes == delta.text.encode()


@FALLBACK
def test_invalid_bytes_become_replacement_characters(family: Kind) -> None:
    """``<0xC3> <0xA9> <0x82> a`` once raised an error: the decoder takes back a streamed character."""
    fast, tokenizer = tokenizer_of(family)
    tokens = [*bytes_of(fast, b"\xc3\xa9\x82", family), fast.convert_tokens_to_ids("a")]
    got = deltas(tokenizer, tokens, logprobs=0)
    assert [delta.text for delta in got] == ["", "\u00e9", "\ufffd", "a"]
    assert b"".join(delta.logprobs[0].token_bytes for delta in got if delta.logprobs) == b"\xc3\xa9\x82a"


@BYTES
@settings(deadline=None)
@given(raw=st.binary(min_size=1, max_size=12))
def test_bytes_of_tokens_are_exact(family: Kind, raw: bytes) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = bytes_of(fast, raw, family)
    got = deltas(tokenizer, tokens, logprobs=0)
    assert "".join(delta.text for delta in got) == raw.decode("utf-8", "replace")
    assert b"".join(delta.logprobs[0].token_bytes for delta in got if delta.logprobs) == raw


@BYTES
def test_a_character_is_streamed_with_its_last_byte(family: Kind) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = bytes_of(fast, "\U0001f600!".encode(), family)
    assert [delta.text for delta in deltas(tokenizer, tokens)] == ["", "", "", "\U0001f600", "!"]


@EVERY
def test_a_stop_string_across_two_tokens_ends_the_answer(family: Kind) -> None:
    """For every two adjacent tokens, the stop string is the last character and the first of the next."""
    fast, tokenizer = tokenizer_of(family)
    tokens = fast(" tile solar at mist", add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.piece(token)[0] for token in tokens]
    text = "".join(pieces)
    stops = {left[-1] + right[0] for left, right in pairwise(pieces) if left and right}
    assert len(stops) > 3
    for stop in stops:
        got = deltas(tokenizer, tokens, stop=(stop,))
        ended = next(index for index, delta in enumerate(got) if delta.finish_reason == "stop")
        assert "".join(delta.text for delta in got[: ended + 1]) == text[: text.index(stop)]
        assert got[ended].stop_reason == stop


@BYTES
def test_a_stop_string_ends_with_a_characters_last_byte(family: Kind) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = bytes_of(fast, "a\U0001f600!".encode(), family)
    got = deltas(tokenizer, tokens, stop=("a\U0001f600",))
    reasons = [delta.finish_reason for delta in got[:5]]
    assert reasons == [None] * 4 + ["stop"]
    assert "".join(delta.text for delta in got[:5]) == ""


@EVERY
def test_special_tokens_are_skipped_or_shown_whole(family: Kind) -> None:
    fast, tokenizer = tokenizer_of(family)
    word, end = fast(" at", add_special_tokens=False)["input_ids"], fast.eos_token_id
    tokens = [*word, end, *word]
    text = streamed(tokenizer, word)
    assert streamed(tokenizer, tokens) == text + text
    shown = streamed(tokenizer, tokens, skip_special_tokens=False)
    assert shown.replace(" ", "") == f"{text}{fast.eos_token}{text}".replace(" ", "")
