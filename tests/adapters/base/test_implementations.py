"""A model's attention implementations, in the form that transformers takes back."""

from __future__ import annotations

from transformers import AutoConfig

from adapters.base.implementations import implementations_of, names_in


def test_a_plain_model_has_one() -> None:
    config = AutoConfig.for_model("llama")
    config._attn_implementation = "sdpa"
    assert implementations_of(config) == {"": "sdpa"}
    assert names_in({"": "sdpa"}) == {"sdpa"}


def test_the_parts_of_a_composite_model_have_their_own_as_plain_names() -> None:
    """Older transformers take no dict for a part that has no parts itself."""
    config = AutoConfig.for_model("gemma3")
    config._attn_implementation = "sdpa"
    config.vision_config._attn_implementation = "eager"
    found = implementations_of(config)
    assert found == {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}
    assert names_in(found) == {"sdpa", "eager"}


def test_parts_of_parts_are_nested() -> None:
    config = AutoConfig.for_model("qwen2_5_omni")
    config._attn_implementation = "sdpa"
    found = implementations_of(config)
    assert isinstance(found["thinker_config"], dict)
    assert names_in({"": "a", "x": {"": "b", "y": "c"}}) == {"a", "b", "c"}


def test_settings_that_are_no_models_are_left_out() -> None:
    """transformers refuses None for them."""
    config = AutoConfig.for_model("dbrx")
    config._attn_implementation = "sdpa"
    config.attn_config._attn_implementation = config.ffn_config._attn_implementation = None
    assert implementations_of(config) == {"": "sdpa"}
