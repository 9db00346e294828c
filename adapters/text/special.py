"""Special tokens in a user's message are text. Only those that the template writes become tokens.

Such strings in messages get marks around them before rendering, so the rendered text shows where each one
comes from. The text is then encoded in one piece by a copy of the tokenizer in which every added token is
text. A placeholder replaces each real special token, so merges and spaces are the same as around the token
itself. transformers' ``sanitize_control_tokens`` marks in the same way, but encodes the pieces separately.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from adapters.text.messages import Message

# Unicode's noncharacters: reserved for internal use, so no exchanged text contains them.
_START, _END, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
_PLACEHOLDERS = {
    (False, False): "\ufdd3",
    (False, True): "\ufdd4",
    (True, False): "\ufdd5",
    (True, True): "\ufdd6",
}
"""One placeholder for each combination of an added token's lstrip and rstrip."""
_OWN = re.compile("[\ufdd0-\ufdef]")
_MARK = re.compile(f"[{_START}{_END}]")


class SpecialTokens:
    """Marks and encodes the special tokens of one tokenizer. Immutable, so any thread may use it.

    Args:
        fast: a transformers fast tokenizer.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        # A token that only matches whole words stays text beside marked ones. Chat tokenizers have none.
        self._added: dict[str, tuple[int, AddedToken]] = {
            token.content: (id_, token)
            for id_, token in fast.added_tokens_decoder.items()
            if token.content and not token.single_word
        }
        self._any = any_of(self._added)
        self._marked = re.compile(f"{_START}({self._any.pattern}){_END}|{_MARK.pattern}")
        special_ids = {id_ for id_, token in self._added.values() if token.special}
        self._special_ids = special_ids - {fast.unk_token_id}  # text outside the vocabulary is text anyway
        self._plain = _plain_copy(fast.backend_tokenizer)
        self._placeholder_ids = frozenset(self._plain.token_to_id(text) for text in _PLACEHOLDERS.values())
        self._break_id = self._plain.token_to_id(_BREAK)

    def marker(self, literals: str) -> Marker:
        """The marker of messages for a template that can write ``literals``.

        Control tokens are the special ones, and other added tokens that the template writes, such as
        DeepSeek's turns. In an assistant's message the latter stay tokens, because it generates ``<think>``
        as one.
        """
        special = [text for text, (_, token) in self._added.items() if token.special]
        written = [text for text in self._added if text in literals and not text.isspace()]
        return Marker(any_of(special), any_of([*special, *written]))

    def encode(self, text: str, marked: bool) -> list[int]:
        """Token ids of rendered text. Marked text never becomes a special token. Raises ValueError."""
        if not marked:
            ids: list[int] = self._fast(text, add_special_tokens=False)["input_ids"]
            return ids
        for divide in (False, True):
            found = self._encode_marked(text, divide)
            if found is not None:
                return found
        raise ValueError("a message contains a special token that cannot be encoded as plain text")

    def encode_after(self, before: str, head: list[int], text: str, marked: bool) -> list[int]:
        """Token ids of ``text`` where it follows ``before``, whose ids are ``head``. Raises ValueError."""
        whole = self.encode(before + text, marked)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        # A token spans the boundary, but generation begins there, so the token is split.
        # SentencePiece puts a space before the first word of a text, so another character comes first.
        newline, whole = self.encode("\n", False), self.encode("\n" + text, marked)
        return whole[len(newline) :] if whole[: len(newline)] == newline else self.encode(text, marked)

    def _encode_marked(self, text: str, divide: bool) -> list[int] | None:
        """None if plain text became a special token. ``divide`` splits marked text to prevent that."""
        meant: list[int] = []

        def placeholder(match: re.Match[str]) -> str:
            id_, token = self._added[match[0]]
            meant.append(id_)
            return _PLACEHOLDERS[token.lstrip, token.rstrip]

        pieces = []
        for piece, marked in self._pieces(text):
            if not marked:
                pieces.append(self._any.sub(placeholder, piece))
            else:
                pieces.append(_BREAK.join(piece) if divide else piece)
        return self._ids("".join(pieces), iter(meant))

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text without its marks, as pieces with a flag for marked ones.

        A template that splits a message may separate two marks. They are removed, and still end a piece.
        """
        end = 0
        for match in self._marked.finditer(text):
            yield text[end : match.start()], False
            yield match[1] or "", True
            end = match.end()
        yield text[end:], False

    def _ids(self, text: str, meant: Iterator[int]) -> list[int] | None:
        ids: list[int] = []
        for id_ in self._plain.encode(text, add_special_tokens=False).ids:
            if id_ in self._placeholder_ids:
                ids.append(next(meant))
            elif id_ in self._special_ids:
                return None
            elif id_ != self._break_id:
                ids.append(id_)
        return ids


class Marker:
    """Marks text in messages that looks like a control token.

    Args:
        special: finds such text in an assistant's message.
        control: finds such text in all other messages.
    """

    def __init__(self, special: re.Pattern[str], control: re.Pattern[str]) -> None:
        self._special, self._control = special, control

    def mark(self, messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
        """The messages with marks, and whether there are any marks."""
        if not any(self._pattern(one).search(text) for one in messages for text in _texts(one).values()):
            return messages, False
        return [one | self._marked(one) for one in messages], True

    def _marked(self, message: Message) -> Message:
        pattern = self._pattern(message)
        return {
            field: pattern.sub(f"{_START}\\g<0>{_END}", _OWN.sub("", text))
            for field, text in _texts(message).items()
        }

    def _pattern(self, message: Message) -> re.Pattern[str]:
        return self._special if message["role"] == "assistant" else self._control


def unmarked(text: str) -> str:
    """Rendered text without marks."""
    return _MARK.sub("", text)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds the longest of ``texts``.

    It is built by common prefixes, as there may be thousands.
    """
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return re.compile(_pattern_of(tree) if tree else "(?!)")


def _pattern_of(tree: Mapping[str, Any]) -> str:
    branches = [re.escape(first) + _pattern_of(rest) for first, rest in tree.items() if first]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in tree else ''}"


def _texts(message: Message) -> Message:
    return {field: text for field, text in message.items() if field != "role"}


def _plain_copy(backend: Any) -> Tokenizer:
    """A copy of the tokenizer in which every added token is text, with placeholders."""
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    plain.add_special_tokens(
        [_text_only(token) for token in backend.get_added_tokens_decoder().values() if token.content]
    )
    plain.encode_special_tokens = True
    plain.add_tokens([AddedToken(_BREAK, normalized=False)])
    plain.add_tokens(
        [
            AddedToken(text, lstrip=lstrip, rstrip=rstrip, normalized=False)
            for (lstrip, rstrip), text in _PLACEHOLDERS.items()
        ]
    )
    return plain


def _text_only(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
        special=True,  # ``encode_special_tokens`` affects only special tokens
    )
