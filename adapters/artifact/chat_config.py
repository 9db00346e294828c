"""The chat settings in an adapter's folder: its chat template, and the tokens that end an answer.

Trainers save the tokenizer's files beside the adapter. The order of precedence is that of transformers:
``chat_template.jinja``, then ``tokenizer_config.json``, then ``chat_template.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adapters.artifact.files import open_file, parse_object, read_exactly, read_file
from adapters.errors import AdapterError, AdapterInvalid

MAX_TEMPLATE_BYTES = 256 << 10
_MAX_JSON_BYTES = 4 << 20
_TEMPLATE, _TOKENIZER, _TEMPLATE_JSON = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
_SPECIAL, _GENERATION, _FAST = "special_tokens_map.json", "generation_config.json", "tokenizer.json"
CHAT_CONFIG_FILES = (_TEMPLATE, _TOKENIZER, _TEMPLATE_JSON, _SPECIAL, _GENERATION, _FAST)
_FAST_HEAD_BYTES = 1 << 20
"""Bytes of ``tokenizer.json`` that are read. Its added tokens come before its vocabulary, which is large."""
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class ChatConfig:
    """The settings as the folder has them. They are not checked against the base here.

    Attributes:
        template: Jinja; None = the base's.
        tokens: special tokens by name (``eos_token``, …), which a template may read.
        eos_ids: of the generation config; empty = the base's.
        added: tokens that the tokenizer has added to its vocabulary, by id.
    """

    template: str | None
    tokens: tuple[tuple[str, str], ...]
    eos_ids: tuple[int, ...]
    added: tuple[tuple[int, str], ...]

    def digested(self) -> bytes:
        """The part that changes prompts and answers, for the adapter's digest."""
        return json.dumps([self.template, self.tokens, self.eos_ids]).encode()


def read_chat_config(folder: int) -> ChatConfig | None:
    """The settings in an open folder; None if it has none.

    Raises:
        AdapterInvalid: a file is a link or malformed.
        AdapterTooLarge: a file is larger than such a file can be.
    """
    tokenizer, special = _object(folder, _TOKENIZER), _object(folder, _SPECIAL)
    tokens = {name: text for name in _TOKENS if (text := _token(tokenizer, special, name))}
    template = _template(folder, tokenizer)
    eos_ids = _eos_ids(_object(folder, _GENERATION))
    if template is None and "eos_token" not in tokens and not eos_ids:
        return None
    return ChatConfig(template, tuple(tokens.items()), eos_ids, _added(tokenizer) or _added_of_fast(folder))


def _template(folder: int, tokenizer: Mapping[str, Any]) -> str | None:
    data = _bytes(folder, _TEMPLATE, MAX_TEMPLATE_BYTES)
    if data is not None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise AdapterInvalid(f"{_TEMPLATE} is not UTF-8 (byte {error.start}).") from error
    for name, config in ((_TOKENIZER, tokenizer), (_TEMPLATE_JSON, _object(folder, _TEMPLATE_JSON))):
        template = _default(config.get("chat_template"), name)
        if template is not None:
            return template
    return None


def _default(value: Any, name: str) -> str | None:
    """The template. Of several named ones it is the default, which is for conversations without tools."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {one.get("name"): one.get("template") for one in value}
    if isinstance(value, dict):
        value = value.get("default")
    if value is None:
        return None
    if not isinstance(value, str) or len(value.encode()) > MAX_TEMPLATE_BYTES:
        raise AdapterInvalid(
            f"{name}: chat_template must be a string or a list of named templates, of at most "
            f"{MAX_TEMPLATE_BYTES} bytes."
        )
    return value


def _token(tokenizer: Mapping[str, Any], special: Mapping[str, Any], name: str) -> str | None:
    """A special token. The value is a string or an object with ``content``."""
    value = tokenizer.get(name, special.get(name))
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _eos_ids(generation: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id_) is int for id_ in ids):
        raise AdapterInvalid(f"{_GENERATION}: eos_token_id must be a token id or a list of token ids.")
    return tuple(ids)


def _added(tokenizer: Mapping[str, Any]) -> tuple[tuple[int, str], ...]:
    entries = tokenizer.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return ()
    contents = {id_: entry.get("content") for id_, entry in entries.items() if isinstance(entry, dict)}
    return tuple(
        (int(id_), text) for id_, text in contents.items() if id_.isdecimal() and isinstance(text, str)
    )


def _added_of_fast(folder: int) -> tuple[tuple[int, str], ...]:
    """The added tokens in ``tokenizer.json``. Since version 5 transformers lists them only there."""
    with suppress(AdapterError), open_file(folder, _FAST, 2**63) as (stream, size):
        text = read_exactly(stream, min(size, _FAST_HEAD_BYTES), _FAST).decode("utf-8", "replace")
        start = text.find("[", text.find('"added_tokens"'))
        with suppress(ValueError, RecursionError):
            entries, _ = json.JSONDecoder().raw_decode(text, max(start, 0))
            return tuple(filter(None, map(_id_and_content, entries if isinstance(entries, list) else [])))
    return ()


def _id_and_content(entry: object) -> tuple[int, str] | None:
    match entry:
        case {"id": int(id_), "content": str(text)}:
            return id_, text
    return None


def _object(folder: int, name: str) -> Mapping[str, Any]:
    data = _bytes(folder, name, _MAX_JSON_BYTES)
    return {} if data is None else parse_object(data, name)


def _bytes(folder: int, name: str, most: int) -> bytes | None:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return read_file(folder, name, most)
