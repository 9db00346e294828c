"""The chat template and the end tokens of an adapter's folder, and which ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.artifact import AdapterInfo, inspect_adapter
from adapters.artifact.chat_config import MAX_TEMPLATE_BYTES, ChatConfig
from adapters.errors import AdapterError, AdapterUnsupported
from adapters.text.chat_format import ChatFormat, ChatFormats
from adapters.text.renderer import base_renderer
from adapters.watcher.signature import signature_of
from tests.adapters.artifact.folders import LAYOUT, LIMITS, write_folder
from tests.support.tiny_models import tiny_tokenizer

OWN = "{{ eos_token }}{{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": OWN}]
FAST = tiny_tokenizer()
EOS = frozenset({2})


def inspect(folder: Path, **options: Any) -> AdapterInfo:
    return inspect_adapter(folder, LAYOUT, LIMITS, **options)


def folder_with(folder: Path, **files: Any) -> Path:
    """Write an adapter and more files: ``name__json={…}`` becomes ``name.json``, and so on."""
    write_folder(folder)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": OWN},
        {"chat_template__jinja": OWN, "tokenizer_config__json": {"chat_template": "another"}},
        {
            "tokenizer_config__json": {"chat_template": OWN},
            "chat_template__json": {"chat_template": "another"},
        },
        {"tokenizer_config__json": {"chat_template": NAMED}},
        {"chat_template__json": {"chat_template": OWN}},
    ],
)
def test_a_template_is_found_where_transformers_finds_it(tmp_path: Path, files: dict[str, Any]) -> None:
    config = inspect(folder_with(tmp_path / "a", **files)).chat_config
    assert config is not None
    assert config.template == OWN


def test_the_files_that_transformers_saves_beside_an_adapter_are_read(tmp_path: Path) -> None:
    """They include a length of 31 digits, which transformers writes for a tokenizer without a limit."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN
    folder = write_folder(tmp_path / "a")
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] >= 10**30
    config = inspect(folder).chat_config
    assert config is not None
    assert config.template == OWN
    assert dict(config.tokens)["eos_token"] == tokenizer.eos_token


def test_ends_of_answers_are_read(tmp_path: Path) -> None:
    tokenizer = {"eos_token": {"content": "<|im_end|>", "special": True}}
    files: dict[str, Any] = {
        "tokenizer_config__json": tokenizer,
        "generation_config__json": {"eos_token_id": [2, 0]},
    }
    config = inspect(folder_with(tmp_path / "a", **files)).chat_config
    assert config == ChatConfig(None, (("eos_token", "<|im_end|>"),), (2, 0), ())
    mapped = {"special_tokens_map__json": {"eos_token": "<|im_end|>"}}
    config = inspect(folder_with(tmp_path / "b", **mapped)).chat_config
    assert config is not None
    assert config.tokens == (("eos_token", "<|im_end|>"),)


def test_the_template_is_part_of_the_digest_unless_ignored(tmp_path: Path) -> None:
    plain = inspect(folder_with(tmp_path / "a"))
    folder = folder_with(tmp_path / "b", chat_template__jinja=OWN)
    other = folder_with(tmp_path / "c", chat_template__jinja=OWN + " ")
    assert len({plain.digest, inspect(folder).digest, inspect(other).digest}) == 3
    assert inspect(folder, ignore_chat_config=True) == plain
    assert plain.chat_config is None


def test_the_watcher_sees_a_changed_template(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a")
    before = signature_of(str(folder))
    assert None not in before
    (folder / "chat_template.jinja").write_text(OWN)
    assert signature_of(str(folder)) != before


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"chat_template__jinja": "x" * (MAX_TEMPLATE_BYTES + 1)}, "at most 262144"),
        (
            {"tokenizer_config__json": {"chat_template": "x" * (MAX_TEMPLATE_BYTES + 1)}},
            "at most 262144 bytes",
        ),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template must be a string"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "eos_token_id must be a token id"),
    ],
)
def test_invalid_templates_are_refused(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        inspect(folder_with(tmp_path / "a", **files))


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = folder_with(tmp_path / "a")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="not a link"):
        inspect(folder)


def chat_formats() -> ChatFormats:
    return ChatFormats(FAST, len(FAST), ChatFormat(base_renderer(FAST), EOS), frozenset({0}))


def config(template: str | None = None, **fields: Any) -> ChatConfig:
    return ChatConfig(**({"template": template, "tokens": (), "eos_ids": (), "added": ()} | fields))


def test_an_adapters_template_uses_the_adapters_special_tokens() -> None:
    all_ = chat_formats()
    chat_format = all_.of(
        config("[{{ eos_token }}] {{ messages[0].content }}", tokens=(("eos_token", "<|endoftext|>"),))
    )
    assert chat_format.from_adapter
    assert chat_format.renderer is not None
    ids = chat_format.renderer.prompt([{"role": "user", "content": "so <|im_end|>"}])
    assert FAST.decode(ids) == "[<|endoftext|>] so <|im_end|>"
    assert 2 not in ids
    assert chat_format.eos == {0}
    all_.close()


def test_a_template_equal_to_the_bases_shares_its_renderer() -> None:
    all_ = chat_formats()
    same = config(FAST.chat_template, tokens=(("eos_token", FAST.eos_token),))
    assert all_.of(None) is all_.base
    assert all_.of(same) == ChatFormat(all_.base.renderer, frozenset({0, 2}))


def test_end_tokens_come_from_the_folder_or_else_from_the_base() -> None:
    all_ = chat_formats()
    assert all_.of(config(eos_ids=(1,))).eos == {1, FAST.eos_token_id}
    assert all_.of(config(tokens=(("eos_token", "<|endoftext|>"),))).eos == {0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            config(tokens=(("eos_token", "<|eot|>"),)),
            r"eos_token is '<\|eot\|>', which is not a token of the base",
        ),
        (config(eos_ids=(512,)), "token 512, but the base's vocabulary has 512"),
        (config("<|eot|>{{ 1 }}", added=((600, "<|eot|>"),)), r"writes '<\|eot\|>', .* another vocabulary"),
        (config("<|im_end|>{{ 1 }}", added=((600, "<|im_end|>"),)), "another vocabulary"),
        (config("{% if %}"), "cannot be used"),
        (config("{{ raise_exception('never') }}"), "cannot be used: never"),
    ],
)
def test_tokens_and_templates_that_the_base_cannot_use_are_refused(text: ChatConfig, reason: str) -> None:
    all_ = chat_formats()
    with pytest.raises(AdapterUnsupported, match=reason):
        all_.check(text)
    all_.close()


@pytest.mark.parametrize("own_template", [True, False])
def test_a_tokenizer_with_other_ids_is_refused(tmp_path: Path, own_template: bool) -> None:
    """transformers saves the added tokens only in tokenizer.json."""
    tokenizer = tiny_tokenizer()
    folder = write_folder(tmp_path / "a")
    if own_template:
        tokenizer.chat_template += " "
    tokenizer.save_pretrained(folder)
    all_ = chat_formats()
    all_.check(inspect(folder).chat_config)
    saved = json.loads((folder / "tokenizer.json").read_text())
    first, second = saved["added_tokens"][1:3]
    first["id"], second["id"] = second["id"], first["id"]
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(AdapterUnsupported, match="another vocabulary"):
        all_.check(inspect(folder).chat_config)
    all_.close()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"added_tokens": [', '{"added_tokens": [{"id": 1e9}, 3]}', "[" * 99999]
)
def test_a_malformed_tokenizer_file_adds_no_tokens(tmp_path: Path, text: str) -> None:
    folder = folder_with(tmp_path / "a", chat_template__jinja=OWN, tokenizer__json=text)
    config = inspect(folder).chat_config
    assert config is not None
    assert config.added == ()


def test_tokens_that_the_template_does_not_write_are_allowed() -> None:
    all_ = chat_formats()
    all_.check(config("{{ messages[0].content }}", added=((600, "[PAD]"), (2, "<|im_end|>"))))
    all_.close()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "it renders nothing. Repair it"),
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate. Repair it"),
    ],
)
def test_a_template_that_cannot_render_a_greeting_is_refused(template: str, reason: str) -> None:
    all_ = chat_formats()
    with pytest.raises(AdapterUnsupported, match=reason):
        all_.check(config(template))
    all_.close()
