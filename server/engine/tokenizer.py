"""Text to tokens and back: encoding, conversations, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers.decoders import DecodeStream

from adapters.text.messages import Message
from adapters.text.renderer import ChatRenderer
from adapters.text.template import TemplateRefused
from server.engine.text_bounds import TextBounds
from server.errors import InvalidRequest

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """The base's own tokenizer, and what renders conversations.

    Args:
        fast: a transformers fast tokenizer.
        vocab_size: of the model's logits (may exceed the tokenizer's).
        eos: the generation config's end-of-sequence tokens.
        renderer: None = the base has no chat template.
        bounds: refuses texts that cannot fit; None = nothing is refused.
    """

    def __init__(
        self,
        fast: Any,
        vocab_size: int,
        eos: frozenset[int],
        renderer: ChatRenderer | None = None,
        bounds: TextBounds | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos = eos
        self.renderer = renderer
        self._bounds = bounds
        self._fast = fast
        self._backend = fast.backend_tokenizer
        self._byte_of = {character: byte for byte, character in _byte_level_alphabet().items()}

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt; special tokens that are written in it count as such, as in vLLM.

        Raises PromptTooLong, if that can be known before.
        """
        if self._bounds is not None:
            self._bounds.check("prompt", text)
        ids: list[int] = self._fast(text)["input_ids"]
        return ids

    def render_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, ready for the answer.

        Raises:
            InvalidRequest: there is no template, or it refuses these messages (it says why).
            PromptTooLong: they cannot fit, and that can be known before they are tokenised.
        """
        if self.renderer is None:
            raise InvalidRequest("The base has no chat template; use /v1/completions.", param="messages")
        if self._bounds is not None:
            size = sum(len(text.encode()) for message in messages for text in message.values())
            self._bounds.check_bytes("messages", size)
        try:
            return self.renderer.prompt(messages, self._check_rendered)
        except TemplateRefused as error:
            raise InvalidRequest(f"The base's chat template refuses it: {error}", param="messages") from error

    def _check_rendered(self, text: str) -> None:
        if self._bounds is not None:
            self._bounds.check("messages", text)

    def stream(self, skip_special_tokens: bool) -> TextStream:
        return TextStream(self, skip_special_tokens)

    def step(self, stream: DecodeStream, token: int) -> str:
        return stream.step(self._backend, token) or ""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=skip_special_tokens)
        return text

    @lru_cache(maxsize=65536)  # noqa: B019  (one tokenizer lives as long as the process)
    def piece(self, token: int) -> tuple[str, bytes]:
        """A token's own text and the exact bytes it stands for.

        The text of a token that is part of a character is U+FFFD; its bytes are still right for byte-level
        BPE and for SentencePiece's byte tokens.
        """
        text: str = self._backend.decode([token], skip_special_tokens=False)
        if _REPLACEMENT not in text:
            return text, text.encode()
        raw = self._backend.id_to_token(token) or ""
        if len(raw) == 6 and raw.startswith("<0x"):
            return text, bytes([int(raw[3:5], 16)])
        if raw and all(character in self._byte_of for character in raw):
            return text, bytes(self._byte_of[character] for character in raw)
        return text, text.encode()


class TextStream:
    """One answer's text, token by token; a character split over tokens comes with its last one."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._length = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes, possibly none."""
        self._tokens.append(token)
        text = self._tokenizer.step(self._stream, token)
        self._length += len(text)
        return text

    def finish(self) -> str:
        """What a last unfinished character leaves, as U+FFFD."""
        return self._tokenizer.decode(self._tokens, self._skip)[self._length :]


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's mapping of bytes to printable characters (``bytes_to_unicode`` in its encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in mapping)
    return mapping | {byte: chr(256 + i) for i, byte in enumerate(others)}
