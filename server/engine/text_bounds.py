"""Refuses texts that cannot fit before they are tokenised whole, which takes 300 bytes a token.

The first check counts bytes: no token stands for more bytes than the longest in the vocabulary. The second
check is for texts much longer than usual. It tokenises the beginning of the text, and doubles its length as
long as that fits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

from server.errors import PromptTooLong

LONG_TEXT = 64 << 10
"""Texts of this many characters or more are tokenised in a queue of their own."""
_USUAL = 6
"""Characters a token. A text that fits seldom has more on average."""
_FIRST = 2
_NFC_SHRINKS = 3
"""This many bytes may become one when a text is composed (Hangul)."""
_KEEPS_ALL = {"ByteLevel", "Digits", "Metaspace", "Prepend", "Punctuation", "Sequence"}


class TextBounds:
    """Checks whether texts may fit into a context of ``context`` tokens. Immutable; safe from any thread."""

    def __init__(self, backend: Tokenizer, context: int) -> None:
        self._backend = backend
        self._context = context
        self._longest = longest_token(json.loads(backend.to_str()))

    def check_bytes(self, field: str, size: int) -> None:
        """Raises PromptTooLong if any text of ``size`` bytes has more tokens than fit."""
        if self._longest is not None and size > self._context * self._longest:
            raise PromptTooLong(field, self._context, size // self._longest, at_least=True)

    def check(self, field: str, text: str) -> None:
        """Raises PromptTooLong for a text that is certainly too long. Other texts may be too long, too."""
        self.check_bytes(field, len(text.encode()))
        if len(text) <= _USUAL * self._context:
            return
        end = _FIRST * self._context
        while end < len(text):
            tokens = len(self._backend.encode_batch_fast([text[:end]])[0])
            if tokens > self._context * 3 // 2:  # more text can change only the last word's tokens
                raise PromptTooLong(field, self._context, tokens, at_least=True)
            end *= 2


def longest_token(tokenizer: dict[str, Any]) -> int | None:
    """The most bytes of text that one token can stand for; None if there is no limit.

    There is no limit where text may vanish (dropped spaces) or become a single unknown token.

    Args:
        tokenizer: as ``tokenizer.json`` has it.
    """
    normalizers = list(_steps(tokenizer["normalizer"]))
    splitters = list(_steps(tokenizer["pre_tokenizer"]))
    model, by_bytes = tokenizer["model"], any(step["type"] == "ByteLevel" for step in normalizers + splitters)
    if not (model.get("byte_fallback") or (model["type"] == "BPE" and by_bytes)):
        return None
    if not all(_keeps_text(step) for step in normalizers + splitters):
        return None
    vocabulary = (entry if isinstance(entry, str) else entry[0] for entry in model["vocab"])
    own = max(len(token) if by_bytes else len(token.encode()) for token in vocabulary)
    added = (len(token["content"].encode()) for token in tokenizer["added_tokens"] or ())
    shrinks = _NFC_SHRINKS if any(step["type"] == "NFC" for step in normalizers) else 1
    return max(own, *added, 1) * shrinks


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The step, and the steps that it is a sequence of."""
    if step is not None:
        yield step
        for each in step.get("normalizers") or step.get("pretokenizers") or ():
            yield from _steps(each)


def _keeps_text(step: dict[str, Any]) -> bool:
    kind = step["type"]
    if kind == "Split":
        return bool(step["behavior"] != "Removed")
    if kind == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
    return kind in _KEEPS_ALL or kind == "NFC"
