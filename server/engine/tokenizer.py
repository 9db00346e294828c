"""Text to tokens and back: encoding, chat templates, and detokenising token by token."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from adapters.text.chat_format import ChatFormat, ChatFormats
from adapters.text.messages import Message
from adapters.text.renderer import ChatRenderer
from adapters.text.template import TemplateRefused
from server.engine.text_bounds import TextBounds
from server.errors import InvalidRequest

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""SentencePiece's token for one byte."""


class Tokenizer:
    """The base's tokenizer and chat template.

    Args:
        fast: a transformers fast tokenizer.
        vocab_size: the size of the model's logits, which may exceed the tokenizer's.
        eos: the base's end-of-sequence tokens.
        renderer: renders chats; None = the base has no chat template.
        bounds: refuses texts that cannot fit; None = nothing is refused.
        chat_formats: the adapters' own chat templates and end tokens; None = made from the other arguments.
    """

    def __init__(
        self,
        fast: Any,
        vocab_size: int,
        eos: frozenset[int],
        renderer: ChatRenderer | None = None,
        bounds: TextBounds | None = None,
        chat_formats: ChatFormats | None = None,
    ) -> None:
        self.chat_formats = chat_formats or ChatFormats(fast, vocab_size, ChatFormat(renderer, eos), eos)
        self.vocab_size = vocab_size
        self.eos = eos
        self.renderer = renderer
        self._bounds = bounds
        self._fast = fast
        self._backend = fast.backend_tokenizer
        self._byte_of = {character: byte for byte, character in _byte_level_alphabet().items()}
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(id_ for id_, token in added.items() if token.special)
        self._anchor = self._anchor_for_pieces()

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt. Special tokens written in it are recognised, as in vLLM.

        Raises PromptTooLong if that is known before tokenising.
        """
        if self._bounds is not None:
            self._bounds.check("prompt", text)
        ids: list[int] = self._fast(text)["input_ids"]
        return ids

    def render_chat(self, messages: Sequence[Message], chat_format: ChatFormat | None = None) -> list[int]:
        """Token ids of the conversation, rendered with ``chat_format``'s template; None = the base's.

        Raises:
            InvalidRequest: there is no template, or it refuses these messages and says why.
            PromptTooLong: the messages cannot fit, and that is known before they are tokenised.
        """
        chat_format = chat_format or self.chat_formats.base
        if chat_format.renderer is None:
            raise InvalidRequest("The base has no chat template; use /v1/completions.", param="messages")
        if self._bounds is not None:
            size = sum(len(text.encode()) for message in messages for text in message.values())
            self._bounds.check_bytes("messages", size)
        try:
            return chat_format.renderer.prompt(messages, self._check_rendered)
        except TemplateRefused as error:
            whose = "The adapter's own" if chat_format.from_adapter else "The base's"
            raise InvalidRequest(f"{whose} chat template refuses it: {error}", param="messages") from error

    def _check_rendered(self, text: str) -> None:
        if self._bounds is not None:
            self._bounds.check("messages", text)

    def stream(self, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for a new answer."""
        return Detokenizer(self, skip_special_tokens)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of an answer's tokens, the same as when it is streamed."""
        stream = self.stream(skip_special_tokens)
        return "".join(map(stream.push, tokens)) + stream.finish()

    @lru_cache(maxsize=65536)  # noqa: B019  (the tokenizer lives as long as the process)
    def piece(self, token: int) -> tuple[str, bytes]:
        """A token's text when it follows other text, and the exact bytes that it stands for.

        The text of a token that is part of a character is U+FFFD. Its bytes are still right for byte-level
        BPE and for SentencePiece's byte tokens. Decoders treat the first token of a text differently
        (SentencePiece's drops its space), so the token is decoded after one that is an ordinary word.
        """
        text = self._decode([*self._anchor, token])[len(self._decode(self._anchor)) :]
        if _REPLACEMENT not in text:
            return text, text.encode()
        raw = self._backend.id_to_token(token) or ""
        if _BYTE_TOKEN.fullmatch(raw):
            return text, bytes([int(raw[3:5], 16)])
        if raw and all(character in self._byte_of for character in raw):
            return text, bytes(self._byte_of[character] for character in raw)
        return text, text.encode()

    def is_special(self, token: int) -> bool:
        return token in self._special

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=False)
        return text

    def _anchor_for_pieces(self) -> list[int]:
        """A token that is an ordinary word; empty if the vocabulary has none of those tried."""
        added = self._backend.get_added_tokens_decoder()
        for text in ("a", "the", "1", "."):
            for token in self._backend.encode(text, add_special_tokens=False).ids[-1:]:
                raw = self._backend.id_to_token(token) or ""
                if token not in added and not _BYTE_TOKEN.fullmatch(raw):
                    return [token]
        return []


class Detokenizer:
    """Turns one answer's tokens into text, incrementally. A split character comes with its last token.

    Bytes that are not UTF-8 become U+FFFD; the valid text around them stays.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes, possibly empty."""
        if self._skip and self._tokenizer.is_special(token):
            return ""
        return self._characters.decode(self._tokenizer.piece(token)[1])

    def finish(self) -> str:
        """U+FFFD if the answer ends inside a character, else empty."""
        return self._characters.decode(b"", final=True)


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's mapping of bytes to printable characters (``bytes_to_unicode`` in its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in mapping)
    return mapping | {byte: chr(256 + i) for i, byte in enumerate(others)}
