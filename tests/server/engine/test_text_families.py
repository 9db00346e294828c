"""Text that grows token by token, for real tokenizers of every family, is one decode of the whole."""

from __future__ import annotations

from functools import cache
from typing import Any

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
    TOKENIZER_FAMILIES,
    TokenizerFamily,
    family_tokenizer,
)

EVERY = pytest.mark.parametrize("family", TOKENIZER_FAMILIES)
FALLBACK = pytest.mark.parametrize("family", BYTE_FALLBACK)


@cache
def tokenizer_of(family: TokenizerFamily) -> tuple[Any, Tokenizer]:
    fast = family_tokenizer(family)
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
    """What the tokens add to a prompt, in one decode."""
    prompt = fast("tile", add_special_tokens=False)["input_ids"]
    decode = fast.backend_tokenizer.decode
    whole: str = decode([*prompt, *tokens], skip_special_tokens=skip)
    return whole[len(decode(prompt, skip_special_tokens=skip)) :]


def bytes_of(fast: Any, data: bytes, family: TokenizerFamily) -> list[int]:
    if family == "byte-level":
        alphabet = tokenizer_of(family)[1]._byte_of
        names = {byte: character for character, byte in alphabet.items()}
        return [fast.convert_tokens_to_ids(names[byte]) for byte in data]
    return [fast.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@EVERY
@settings(deadline=None)  # the first builds the tokenizer
@given(
    text=st.text(alphabet="aeirst lmn.,'\n\u00e9\u4e16\U0001f600", min_size=1, max_size=30),
    skip=st.booleans(),
)
def test_the_stream_is_one_decode_of_the_whole(family: TokenizerFamily, text: str, skip: bool) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = fast(text, add_special_tokens=False)["input_ids"]
    tokens = [*tokens, fast.eos_token_id, *tokens]
    expected = behind_a_prompt(fast, tokens, skip)
    assert streamed(tokenizer, tokens, skip_special_tokens=skip) == expected
    assert tokenizer.decode(tokens, skip) == expected


@EVERY
@settings(deadline=None)
@given(data=st.data())
def test_no_sequence_of_tokens_fails(family: TokenizerFamily, data: st.DataObject) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = data.draw(st.lists(st.integers(0, len(fast) + 3), min_size=1, max_size=30))
    stream = streamed(tokenizer, tokens, logprobs=0)
    assert stream == tokenizer.decode(tokens, skip_special_tokens=True)
    if "\ufffd" not in stream:
        assert stream == behind_a_prompt(fast, tokens)


@EVERY
def test_the_first_tokens_space_is_kept(family: TokenizerFamily) -> None:
    fast, tokenizer = tokenizer_of(family)
    token = fast(" at", add_special_tokens=False)["input_ids"][0]
    (delta,) = deltas(tokenizer, [token], logprobs=0)
    assert delta.text.startswith(" ")
    assert " at".startswith(delta.text)
    assert delta.logprobs is not None
    assert delta.logprobs[0].token == delta.text
    assert delta.logprobs[0].token_bytes == delta.text.encode()


@FALLBACK
def test_invalid_bytes_become_replacement_characters(family: TokenizerFamily) -> None:
    """``<0xC3> <0xA9> <0x82> a`` once raised in the decoder, which takes a character back that was shown."""
    fast, tokenizer = tokenizer_of(family)
    tokens = [*bytes_of(fast, b"\xc3\xa9\x82", family), fast.convert_tokens_to_ids("a")]
    got = deltas(tokenizer, tokens, logprobs=0)
    assert [delta.text for delta in got] == ["", "\u00e9", "\ufffd", "a"]
    assert b"".join(delta.logprobs[0].token_bytes for delta in got if delta.logprobs) == b"\xc3\xa9\x82a"


@pytest.mark.parametrize("family", ["byte-level", *BYTE_FALLBACK])
@settings(deadline=None)
@given(raw=st.binary(min_size=1, max_size=12))
def test_any_bytes_are_told_exactly(family: TokenizerFamily, raw: bytes) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = bytes_of(fast, raw, family)
    got = deltas(tokenizer, tokens, logprobs=0)
    assert "".join(delta.text for delta in got) == raw.decode("utf-8", "replace")
    assert b"".join(delta.logprobs[0].token_bytes for delta in got if delta.logprobs) == raw


@pytest.mark.parametrize("family", ["byte-level", *BYTE_FALLBACK])
def test_a_character_is_shown_with_its_last_byte(family: TokenizerFamily) -> None:
    fast, tokenizer = tokenizer_of(family)
    tokens = bytes_of(fast, "\U0001f600!".encode(), family)
    assert [delta.text for delta in deltas(tokenizer, tokens)] == ["", "", "", "\U0001f600", "!"]
