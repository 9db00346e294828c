"""Texts that cannot fit are refused before they are tokenised. No text that fits is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from adapters.text.renderer import base_renderer
from server.engine import tokenizer as tokenizer_module
from server.engine.text_bounds import TextBounds, longest_token
from server.errors import PromptTooLong
from tests.support.tokenizer_families import (
    BYTE_FALLBACK,
    TOKENIZER_FAMILIES,
    TokenizerFamily,
    family_tokenizer,
)

KEEPING: tuple[TokenizerFamily, ...] = ("byte-level", *BYTE_FALLBACK)
FAST = {family: family_tokenizer(family) for family in TOKENIZER_FAMILIES}
CONTEXT = 64


def longest(family: TokenizerFamily) -> int | None:
    return longest_token(json.loads(FAST[family].backend_tokenizer.to_str()))


@pytest.mark.parametrize("family", KEEPING)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200) | st.text(alphabet=" aeioust\n\u00e9\u4e16", max_size=200))
def test_no_token_has_more_bytes_than_the_bound(family: TokenizerFamily, text: str) -> None:
    most = longest(family)
    assert most is not None
    tokens = len(FAST[family](text, add_special_tokens=False)["input_ids"])
    assert len(text.encode()) <= most * tokens


@pytest.mark.parametrize("family", sorted(set(TOKENIZER_FAMILIES) - set(KEEPING)))
def test_if_a_tokenizer_can_drop_text_no_text_is_refused_by_its_bytes(family: TokenizerFamily) -> None:
    assert longest(family) is None
    bounds = TextBounds(FAST[family].backend_tokenizer, CONTEXT)
    bounds.check_bytes("prompt", 1 << 40)
    if family == "wordpiece":
        bounds.check("prompt", " " * 100_000)  # this text has no tokens


@pytest.mark.parametrize(
    ("normalizer", "splitter", "factor"),
    [
        (normalizers.NFC(), None, 3),
        (normalizers.Strip(), None, None),
        (normalizers.Replace("  ", " "), None, None),
        (normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Lowercase()]), None, None),
        (None, pre_tokenizers.WhitespaceSplit(), None),
        (None, pre_tokenizers.Split(" ", "removed"), None),
        (None, pre_tokenizers.Split(" ", "isolated"), 1),
    ],
)
def test_only_tokenizer_steps_that_keep_text_have_a_bound(
    normalizer: Any, splitter: Any, factor: int | None
) -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"four": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    found = longest_token(json.loads(tokenizer.to_str()))
    assert found == (None if factor is None else 6 * factor)


class TestRefusals:
    def tokenizer(self, family: TokenizerFamily) -> tokenizer_module.Tokenizer:
        fast = FAST[family]
        bounds = TextBounds(fast.backend_tokenizer, CONTEXT)
        return tokenizer_module.Tokenizer(fast, len(fast), frozenset(), base_renderer(fast), bounds)

    def watched(self, family: TokenizerFamily, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The lengths of the texts that are tokenised whole."""
        seen: list[int] = []
        fast = FAST[family]
        real = type(fast).__call__

        def noting(self: Any, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return real(self, text, **options)

        monkeypatch.setattr(type(fast), "__call__", noting)
        return seen

    @pytest.mark.parametrize("family", TOKENIZER_FAMILIES)
    @pytest.mark.parametrize("text", ["aeio " * 50_000, "世界" * 50_000, "x" * 200_000])
    def test_a_far_too_long_text_is_never_tokenised_whole(
        self, family: TokenizerFamily, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if family not in KEEPING and text[0] not in "aeio":
            pytest.skip("one unknown word is one token of any length")
        tokenizer, seen = self.tokenizer(family), self.watched(family, monkeypatch)
        with pytest.raises(PromptTooLong) as refused:
            tokenizer.encode(text)
        assert (refused.value.param, refused.value.code) == ("prompt", "context_length_exceeded")
        assert f"maximum context length is {CONTEXT} tokens" in str(refused.value)
        assert "your prompt resulted in at least" in str(refused.value)
        with pytest.raises(PromptTooLong) as refused:
            tokenizer.render_chat([{"role": "user", "content": text}])
        assert refused.value.param == "messages"
        assert not seen

    @pytest.mark.parametrize("family", TOKENIZER_FAMILIES)
    def test_texts_near_the_limit_are_counted_exactly(self, family: TokenizerFamily) -> None:
        tokenizer = self.tokenizer(family)
        for text in ("", "aeiou " * 20, "aeiou " * 60, "世" * 30):
            assert tokenizer.encode(text) == FAST[family](text)["input_ids"]

    @given(repeats=st.integers(1, 400), word=st.sampled_from(["    ", "stone ", "a\n", "世", "e"]))
    @settings(max_examples=60, deadline=None)
    def test_nothing_that_fits_is_refused(self, repeats: int, word: str) -> None:
        for family in KEEPING:
            text = word * repeats
            tokens = FAST[family](text)["input_ids"]
            if len(tokens) < CONTEXT:
                assert self.tokenizer(family).encode(text) == tokens
