"""The fields of ``/v1/chat/completions`` and ``/v1/completions``, without those of messages."""

from __future__ import annotations

from server.http.fields.rule import NO_EFFECT, SERVED, Rules, neutral, refused

_NO_TOOLS = "this server does not call tools, so leave it out"
_TEXT_ONLY = "answers are text, so leave it out"
_UNCONSTRAINED = "this server does not constrain answers, so leave it out"
_ONE_SERVER = "this server does not choose among models, so leave it out"
_ADAPTER = "name the adapter in 'model'"
_BIAS = "use 'logit_bias'"

_OPENAI: Rules = {
    "model": SERVED,
    "max_tokens": SERVED,
    "temperature": SERVED,
    "top_p": SERVED,
    "presence_penalty": SERVED,
    "frequency_penalty": SERVED,
    "logit_bias": SERVED,
    "logprobs": SERVED,
    "seed": SERVED,
    "stop": SERVED,
    "n": SERVED,
    "stream": SERVED,
    "stream_options": SERVED,
    "max_completion_tokens": SERVED,  # of chats; clients send it to both
    "user": NO_EFFECT,  # the access log has a hash of it
    "metadata": NO_EFFECT,  # tags of stored completions; none are stored
    "store": NO_EFFECT,
    "prompt_cache_key": NO_EFFECT,  # prompts that begin alike share their KV cache anyway
    "prompt_cache_options": NO_EFFECT,
    "prompt_cache_retention": NO_EFFECT,
    "safety_identifier": NO_EFFECT,
    "service_tier": NO_EFFECT,  # there is one tier
    "parallel_tool_calls": NO_EFFECT,  # there are no tool calls
    "response_format": neutral({"type": "text"}, remedy=_TEXT_ONLY),
    "echo": neutral(False),
    "best_of": neutral(1),
    "suffix": neutral(""),
    "tools": neutral([], remedy=_NO_TOOLS),
    "tool_choice": neutral("none", "auto", remedy=_NO_TOOLS),
    "functions": neutral([], remedy=_NO_TOOLS),
    "function_call": neutral("none", "auto", remedy=_NO_TOOLS),
    "modalities": neutral(["text"], remedy=_TEXT_ONLY),
    "moderation": refused("this server does not moderate, so leave it out"),
}
_VLLM: Rules = {
    "top_k": SERVED,
    "min_p": SERVED,
    "repetition_penalty": SERVED,
    "stop_token_ids": SERVED,
    "ignore_eos": SERVED,
    "min_tokens": SERVED,
    "skip_special_tokens": SERVED,
    "session_id": NO_EFFECT,  # for routers
    "stream_interval": NO_EFFECT,  # chunks are sent as tokens come
    "truncation_side": NO_EFFECT,  # of 'truncate_prompt_tokens'
    "return_token_offsets": NO_EFFECT,  # of other endpoints
    "return_mm_kwargs": NO_EFFECT,
    "use_beam_search": neutral(False),
    "length_penalty": neutral(1.0),
    "early_stopping": neutral(False),
    "include_stop_str_in_output": neutral(False),
    "spaces_between_special_tokens": neutral(True),
    "return_token_ids": neutral(False),
    "return_tokens_as_token_ids": neutral(False),
    "watermarking": neutral(False),
    "priority": neutral(0),
    "thinking_token_budget": neutral(-1),
    "routed_experts_prompt_start": neutral(0),
    "bad_words": neutral([], remedy=_BIAS),
    "vllm_xargs": neutral({}),
    "kv_transfer_params": neutral({}),
    "ec_transfer_params": neutral({}),
    "allowed_token_ids": refused(_BIAS),
    "logprob_token_ids": refused("ask for the likeliest tokens instead"),
    "prompt_logprobs": refused(),
    "truncate_prompt_tokens": refused("send a shorter prompt"),
    "repetition_detection": refused(),
    "logits_processors": refused(_BIAS),
    "request_id": refused("send the header X-Request-Id"),
    "cache_salt": refused("leave it out; --no-enable-prefix-caching turns the prefix cache off"),
    "structured_outputs": refused(_UNCONSTRAINED),
    "structural_tag": refused(_UNCONSTRAINED),
    "guided_json": refused(_UNCONSTRAINED),
    "guided_regex": refused(_UNCONSTRAINED),
    "guided_choice": refused(_UNCONSTRAINED),
    "guided_grammar": refused(_UNCONSTRAINED),
    "guided_decoding_backend": refused(_UNCONSTRAINED),
    "guided_whitespace_pattern": refused(_UNCONSTRAINED),
}
_OTHER_SERVERS: Rules = {
    # llama.cpp
    "cache_prompt": NO_EFFECT,
    "id_slot": neutral(-1),
    "n_predict": refused("send 'max_tokens'"),
    "n_probs": neutral(0, remedy="send 'logprobs'"),
    "repeat_penalty": neutral(1.0, remedy="send 'repetition_penalty'"),
    "typical_p": neutral(1.0),
    "mirostat": neutral(0),
    "dry_multiplier": neutral(0.0),
    "xtc_probability": neutral(0.0),
    "timings_per_token": neutral(False),
    "return_progress": neutral(False),
    "samplers": refused(),
    "grammar": neutral("", remedy=_UNCONSTRAINED),
    "json_schema": refused(_UNCONSTRAINED),
    "lora": neutral([], remedy=_ADAPTER),
    # SGLang and LoRAX
    "lora_path": refused(_ADAPTER),
    "adapter_id": refused(_ADAPTER),
    "regex": refused(_UNCONSTRAINED),
    "ebnf": refused(_UNCONSTRAINED),
    # OpenRouter
    "top_a": neutral(0.0),
    "models": neutral([], remedy=_ONE_SERVER),
    "provider": neutral({}, remedy=_ONE_SERVER),
    "route": refused(_ONE_SERVER),
    "transforms": neutral([], remedy="send a shorter prompt"),
    "usage": refused("every answer has 'usage'; a stream has it with 'stream_options'"),
    # mistakes
    "extra_body": neutral({}, remedy="send its fields beside 'model'"),
    "input": refused("send 'messages' to /v1/chat/completions, or 'prompt' to /v1/completions"),
    "max_output_tokens": refused("send 'max_completion_tokens'"),
}
_REQUEST: Rules = {**_OPENAI, **_VLLM, **_OTHER_SERVERS}

CHAT: Rules = {
    "messages": SERVED,
    **_REQUEST,
    "top_logprobs": SERVED,
    "verbosity": NO_EFFECT,
    "prediction": NO_EFFECT,  # it only makes answers faster
    "media_io_kwargs": NO_EFFECT,  # of images and audio
    "mm_processor_kwargs": NO_EFFECT,
    "reasoning_effort": neutral("none"),
    "include_reasoning": neutral(True),
    "enable_thinking": neutral(False),
    "thinking": neutral({"type": "disabled"}),
    "think": neutral(False),
    "reasoning": neutral({}, {"enabled": False}, {"effort": "none"}),
    "return_prompt_text": neutral(False),
    "add_generation_prompt": neutral(True),
    "continue_final_message": neutral(False),
    "add_special_tokens": neutral(False),
    "documents": neutral([], remedy="send them in 'messages'"),
    "chat_template_kwargs": neutral({}),
    "chat_template": refused("leave it out; adapters may have a template of their own"),
    "web_search_options": refused("this server does not search, so leave it out"),
    "audio": refused(_TEXT_ONLY),
    "prompt": refused("send 'messages'"),
    "instructions": refused("send them in 'messages', with the role 'system'"),
}
COMPLETION: Rules = {
    "prompt": SERVED,
    **_REQUEST,
    "add_special_tokens": neutral(True),
    "prompt_embeds": refused("send 'prompt'"),
    "messages": refused("send them to /v1/chat/completions"),
}
STREAM_OPTIONS: Rules = {
    "include_usage": SERVED,
    "continuous_usage_stats": SERVED,
    "include_obfuscation": NO_EFFECT,  # padding that hides the length of chunks
}
