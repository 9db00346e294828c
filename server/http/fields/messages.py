"""The fields of a chat's messages, and of the parts of their content."""

from __future__ import annotations

from server.http.fields.rule import NO_EFFECT, SERVED, Rules, neutral, refused

_AS_TEXT = "this server does not read tool calls, so write the call and its result in 'content'"
_REASONING = "send 'reasoning_content'"
_NOT_TEXT = refused("conversations are text, so leave the part out")

MESSAGE: Rules = {
    "role": SERVED,
    "content": SERVED,
    "refusal": SERVED,
    "reasoning_content": SERVED,
    "reasoning": SERVED,
    "name": NO_EFFECT,  # chat templates do not show it
    "annotations": NO_EFFECT,  # citations of 'content'
    "parsed": NO_EFFECT,  # the openai package's copy of 'content'
    "provider_specific_fields": NO_EFFECT,  # LiteLLM's copies of other fields
    "cache_control": NO_EFFECT,  # prompts that begin alike share their KV cache anyway
    "tool_calls": neutral([], remedy=_AS_TEXT),
    "function_call": refused(_AS_TEXT),
    "tool_call_id": refused(_AS_TEXT),
    "audio": refused("conversations are text, so send it in 'content'"),
    "images": refused("conversations are text, so leave it out"),
    "reasoning_details": refused(_REASONING),
    "thinking": refused(_REASONING),
    "thinking_blocks": refused(_REASONING),
    "prefix": neutral(False),
}
PART: Rules = {
    "type": SERVED,
    "text": SERVED,
    "refusal": SERVED,
    "cache_control": NO_EFFECT,
    "prompt_cache_breakpoint": NO_EFFECT,
    "annotations": NO_EFFECT,
    "image_url": _NOT_TEXT,
    "image": _NOT_TEXT,
    "input_image": _NOT_TEXT,
    "input_audio": _NOT_TEXT,
    "audio_url": _NOT_TEXT,
    "video_url": _NOT_TEXT,
    "file": _NOT_TEXT,
    "thinking": refused("send it as the message's 'reasoning_content'"),
}
