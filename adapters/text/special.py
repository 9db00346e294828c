"""Special tokens that people write in a message are text; only those that the template writes are tokens.

A message with such a string gets marks around it before it is rendered, so that the rendered text says where
each one comes from. The text is then encoded in one piece by a copy of the tokenizer in which every added
token is text, with a stand-in for each that is meant: so merges and spaces are as around the token itself.
transformers' ``sanitize_control_tokens`` marks in the same way, but encodes the pieces apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from adapters.text.messages import Message

# Unicode's noncharacters: for a program's own use, and in no text that is exchanged.
_START, _END, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"
_STAND_INS = {
    (False, False): "\ufdd3",
    (False, True): "\ufdd4",
    (True, False): "\ufdd5",
    (True, True): "\ufdd6",
}
"""One for each way (lstrip, rstrip) in which an added token takes white space with it."""
_OWN = re.compile("[\ufdd0-\ufdef]")
_MARK = re.compile(f"[{_START}{_END}]")


class SpecialTokens:
    """Marks and encodes the special tokens of one tokenizer. Immutable, for any thread.

    Args:
        fast: a transformers fast tokenizer.
    """

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        # A token that only matches as a whole word stays text beside marked ones; chat tokenizers have none.
        self._added: dict[str, tuple[int, AddedToken]] = {
            token.content: (id_, token)
            for id_, token in fast.added_tokens_decoder.items()
            if token.content and not token.single_word
        }
        self._any = any_of(self._added)
        self._marked = re.compile(f"{_START}({self._any.pattern}){_END}|{_MARK.pattern}")
        special_ids = {id_ for id_, token in self._added.values() if token.special}
        self._special_ids = special_ids - {
            fast.unk_token_id
        }  # what the vocabulary lacks is text all the same
        self._plain = _plain_copy(fast.backend_tokenizer)
        self._stand_in_ids = frozenset(self._plain.token_to_id(text) for text in _STAND_INS.values())
        self._break_id = self._plain.token_to_id(_BREAK)

    def marker(self, literals: str) -> Marker:
        """What marks messages for a template that can write ``literals``.

        Control tokens are the special ones, and other added ones that the template writes (DeepSeek's turns
        are such). In an assistant's own message the latter stay tokens: it generates ``<think>`` as one.
        """
        special = [text for text, (_, token) in self._added.items() if token.special]
        written = [text for text in self._added if text in literals and not text.isspace()]
        return Marker(any_of(special), any_of([*special, *written]))

    def encode(self, text: str, marked: bool) -> list[int]:
        """Token ids of rendered text; what is marked in it becomes no special token. Raises ValueError."""
        if not marked:
            ids: list[int] = self._fast(text, add_special_tokens=False)["input_ids"]
            return ids
        for divide in (False, True):
            found = self._encode_marked(text, divide)
            if found is not None:
                return found
        raise ValueError("a message has a special token that plain text cannot be told from")

    def encode_after(self, before: str, head: list[int], text: str, marked: bool) -> list[int]:
        """Token ids of ``text`` where it follows ``before``, whose ids are ``head``. Raises ValueError."""
        whole = self.encode(before + text, marked)
        if whole[: len(head)] == head:
            return whole[len(head) :]
        # A token spans the place between, but generation begins there: it is divided.
        # SentencePiece puts a space before the first word of a text: let another character be the first.
        newline, whole = self.encode("\n", False), self.encode("\n" + text, marked)
        return whole[len(newline) :] if whole[: len(newline)] == newline else self.encode(text, marked)

    def _encode_marked(self, text: str, divide: bool) -> list[int] | None:
        """None: plain text came out as a special token. ``divide`` parts what is marked to prevent that."""
        meant: list[int] = []

        def stand_in(match: re.Match[str]) -> str:
            id_, token = self._added[match[0]]
            meant.append(id_)
            return _STAND_INS[token.lstrip, token.rstrip]

        pieces = []
        for piece, marked in self._pieces(text):
            if not marked:
                pieces.append(self._any.sub(stand_in, piece))
            else:
                pieces.append(_BREAK.join(piece) if divide else piece)
        return self._ids("".join(pieces), iter(meant))

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text without its marks, each piece with whether it was marked.

        A template that splits a message may part two marks; those are dropped, and still end a piece.
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
            if id_ in self._stand_in_ids:
                ids.append(next(meant))
            elif id_ in self._special_ids:
                return None
            elif id_ != self._break_id:
                ids.append(id_)
        return ids


class Marker:
    """Marks what people have written that looks like a control token.

    Args:
        special: finds it in an assistant's message.
        control: finds it in all others.
    """

    def __init__(self, special: re.Pattern[str], control: re.Pattern[str]) -> None:
        self._special, self._control = special, control

    def mark(self, messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
        """The messages with marks, and whether there are any."""
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
    """Rendered text as people read it."""
    return _MARK.sub("", text)


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of ``texts`` at each place, by their common beginnings: there may be thousands."""
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
    """The tokenizer with every added token as text, and with stand-ins."""
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
            for (lstrip, rstrip), text in _STAND_INS.items()
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
        special=True,  # ``encode_special_tokens`` makes text of special ones alone
    )
