"""Arguments of ``offline.LLM`` that may be one thing or several. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

from server.errors import InvalidRequest

T = TypeVar("T")
Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, object]]


def list_of_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Raises InvalidRequest: one is neither a text nor a list of token ids."""
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
    listed = [cast(Prompt, prompts)] if one else list(cast(Sequence[Prompt], prompts))
    for number, prompt in enumerate(listed):
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise InvalidRequest(f"prompts[{number}] must be a text or a list of token ids.", "prompts")
    return listed


def list_of_conversations(given: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation is a list of dicts, several are a list of such lists."""
    one = len(given) > 0 and isinstance(given[0], Mapping)
    return [cast(Conversation, given)] if one else list(cast(Sequence[Conversation], given))


def one_each(field: str, count: int, given: T | Sequence[T], *single: type) -> list[T]:
    """For each of ``count`` prompts what is given for it: one of the types ``single`` is for all of them.

    Raises InvalidRequest: there are more or fewer than prompts.
    """
    if isinstance(given, single):
        return [cast(T, given)] * count
    listed = list(cast(Sequence[T], given))
    wrong = [one for one in listed if not isinstance(one, single)]
    if wrong:
        raise InvalidRequest(f"{field!r} holds {wrong[0]!r:.60}, which it cannot.", field)
    if len(listed) != count:
        have = f"{field!r} holds {len(listed)}, and there are {count} prompts"
        raise InvalidRequest(f"{have}; give one for all, or one for each.", field)
    return listed


def _are_ids(prompt: object) -> bool:
    return isinstance(prompt, list | tuple) and set(map(type, prompt)) <= {int}
