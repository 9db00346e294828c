"""Every field that clients of OpenAI's API send, and what is done with it here. The one table of it.

What asks for nothing is accepted; what would change the answer, and cannot be had, is refused by name. A null
counts as absent, as OpenAI's clients mean it, so it is in no row. A field without a row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done with one field.

    Attributes:
        kind: ``served``: the body's model declares it; ``no effect``: any value is accepted, and changes
            nothing here; ``neutral``: accepted at the values that ask for nothing; ``refused``: at none.
        neutral: those values.
        remedy: what to do instead of sending another one.
    """

    kind: Literal["served", "no effect", "neutral", "refused"]
    neutral: tuple[object, ...] = ()
    remedy: str = "leave it out"

    def accepts(self, value: object) -> bool:
        """Whether a field that is not served may have this value."""
        return self.kind == "no effect" or any(_same(value, each) for each in self.neutral)


Rules = Mapping[str, Rule]


def _same(value: object, neutral: object) -> bool:
    """JSON's equality: ``true`` is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _neutral(*values: object, remedy: str = "") -> Rule:
    shown = " or ".join(json.dumps(value) for value in values)
    return Rule("neutral", values, remedy or f"leave it out, or send {shown}")


def _refused(remedy: str) -> Rule:
    return Rule("refused", remedy=remedy)


SERVED = Rule("served")
NO_EFFECT = Rule("no effect")
_NO_TOOLS = "this server makes no tool calls, so leave it out"
_AS_TEXT = "this server reads no tool calls, so say in 'content' what was called and what came of it"
_TEXT_ONLY = "answers are text, so leave it out"

_REQUEST: Rules = {
    "model": SERVED,
    "max_tokens": SERVED,
    "max_completion_tokens": SERVED,
    "temperature": SERVED,
    "top_p": SERVED,
    "top_k": SERVED,
    "min_p": SERVED,
    "presence_penalty": SERVED,
    "frequency_penalty": SERVED,
    "repetition_penalty": SERVED,
    "logit_bias": SERVED,
    "logprobs": SERVED,
    "seed": SERVED,
    "stop": SERVED,
    "stop_token_ids": SERVED,
    "ignore_eos": SERVED,
    "min_tokens": SERVED,
    "skip_special_tokens": SERVED,
    "n": SERVED,
    "stream": SERVED,
    "stream_options": SERVED,
    "user": SERVED,
    "metadata": SERVED,
    "store": NO_EFFECT,  # of stored completions: none are stored
    "prompt_cache_key": NO_EFFECT,  # prompts that begin alike share their KV without it
    "prompt_cache_retention": NO_EFFECT,
    "safety_identifier": NO_EFFECT,
    "service_tier": _neutral("auto", "default"),
    "response_format": _neutral({"type": "text"}, remedy=_TEXT_ONLY),
    "echo": _neutral(False),
    "best_of": _neutral(1),
    "suffix": _neutral(""),
    "use_beam_search": _neutral(False),
    "length_penalty": _neutral(1.0),
    "early_stopping": _neutral(False),
    "include_stop_str_in_output": _neutral(False),
    "return_token_ids": _neutral(False),
    "priority": _neutral(0),
    "tools": _neutral([], remedy=_NO_TOOLS),
    "tool_choice": _neutral("none", "auto", remedy=_NO_TOOLS),
    "parallel_tool_calls": NO_EFFECT,  # of the calls, if there were any
    "functions": _neutral([], remedy=_NO_TOOLS),
    "function_call": _neutral("none", "auto", remedy=_NO_TOOLS),
    "modalities": _neutral(["text"], remedy=_TEXT_ONLY),
}
CHAT: Rules = {
    **_REQUEST,
    "messages": SERVED,
    "top_logprobs": SERVED,
    "reasoning_effort": _neutral("none"),
    "verbosity": _neutral("medium"),
    "prediction": NO_EFFECT,  # it only makes answers faster elsewhere
    "web_search_options": _refused("this server searches nothing, so leave it out"),
    "audio": _refused(_TEXT_ONLY),
    "add_generation_prompt": _neutral(True),
    "continue_final_message": _neutral(False),
    "add_special_tokens": _neutral(False),
    "chat_template_kwargs": _neutral({}),
    "prompt": _refused("a chat's prompt is in 'messages'"),
}
COMPLETION: Rules = {
    **_REQUEST,
    "prompt": SERVED,
    "add_special_tokens": _neutral(True),
    "messages": _refused("send them to /v1/chat/completions"),
}
STREAM_OPTIONS: Rules = {
    "include_usage": SERVED,
    "continuous_usage_stats": SERVED,
    "include_obfuscation": NO_EFFECT,  # padding against those who watch the line; TLS is a proxy's here
}
MESSAGE: Rules = {
    "role": SERVED,
    "content": SERVED,
    "reasoning_content": SERVED,
    "reasoning": SERVED,
    "name": NO_EFFECT,  # chat templates do not show it
    "cache_control": NO_EFFECT,  # prompts that begin alike share their KV without it
    "tool_calls": _neutral([], remedy=_AS_TEXT),
    "function_call": _refused(_AS_TEXT),
    "tool_call_id": _refused(_AS_TEXT),
    "annotations": _neutral([]),
    "refusal": _neutral("", remedy="say it in 'content'"),
    "audio": _refused("conversations are text, so say it in 'content'"),
}
_NOT_TEXT = _refused("conversations are text here, so leave the part out")
PART: Rules = {
    "type": SERVED,
    "text": SERVED,
    "cache_control": NO_EFFECT,
    "image_url": _NOT_TEXT,
    "input_audio": _NOT_TEXT,
    "video_url": _NOT_TEXT,
    "file": _NOT_TEXT,
}
JOB: Rules = {
    "integrations": _neutral([], remedy="this server tells no other service of its jobs, so leave it out"),
}
UNLOAD: Rules = {
    "lora_int_id": NO_EFFECT,  # vLLM's own number of the adapter, which it does not read either
}
