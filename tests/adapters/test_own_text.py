"""What an adapter's folder says of its chat template and its end, and what it is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.artifact import AdapterInfo, inspect_adapter
from adapters.artifact.own_text import MAX_TEMPLATE_BYTES, OwnText
from adapters.errors import AdapterError, AdapterUnsupported
from adapters.signature import signature_of
from adapters.text.own import Speech, Speeches
from adapters.text.renderer import base_renderer
from tests.adapters.artifact_folders import LAYOUT, LIMITS, write_folder
from tests.tiny_models import tiny_tokenizer

OWN = "{{ eos_token }}{{ messages[0].content }}"
NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": OWN}]
FAST = tiny_tokenizer()
EOS = frozenset({2})


def inspect(folder: Path, **options: Any) -> AdapterInfo:
    return inspect_adapter(folder, LAYOUT, LIMITS, **options)


def folder_with(folder: Path, **files: Any) -> Path:
    """``name__json={…}`` becomes ``name.json``, ``name__jinja="…"`` ``name.jinja``."""
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
    own = inspect(folder_with(tmp_path / "a", **files)).own_text
    assert own is not None
    assert own.template == OWN


def test_the_files_that_transformers_saves_beside_an_adapter_are_read(tmp_path: Path) -> None:
    """Among them a length of 31 digits, for a tokenizer that has no limit."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OWN
    folder = write_folder(tmp_path / "a")
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] >= 10**30
    own = inspect(folder).own_text
    assert own is not None
    assert own.template == OWN
    assert dict(own.tokens)["eos_token"] == tokenizer.eos_token


def test_ends_of_answers_are_read(tmp_path: Path) -> None:
    tokenizer = {"eos_token": {"content": "<|im_end|>", "special": True}}
    files: dict[str, Any] = {
        "tokenizer_config__json": tokenizer,
        "generation_config__json": {"eos_token_id": [2, 0]},
    }
    own = inspect(folder_with(tmp_path / "a", **files)).own_text
    assert own == OwnText(None, (("eos_token", "<|im_end|>"),), (2, 0), ())
    mapped = {"special_tokens_map__json": {"eos_token": "<|im_end|>"}}
    own = inspect(folder_with(tmp_path / "b", **mapped)).own_text
    assert own is not None
    assert own.tokens == (("eos_token", "<|im_end|>"),)


def test_it_is_part_of_the_digest_unless_it_is_ignored(tmp_path: Path) -> None:
    plain = inspect(folder_with(tmp_path / "a"))
    folder = folder_with(tmp_path / "b", chat_template__jinja=OWN)
    other = folder_with(tmp_path / "c", chat_template__jinja=OWN + " ")
    assert len({plain.digest, inspect(folder).digest, inspect(other).digest}) == 3
    assert inspect(folder, ignore_own_text=True) == plain
    assert plain.own_text is None


def test_the_watcher_sees_it_change(tmp_path: Path) -> None:
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
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template must be a text"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "eos_token_id must be a token id"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        inspect(folder_with(tmp_path / "a", **files))


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = folder_with(tmp_path / "a")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="not a link"):
        inspect(folder)


def speeches() -> Speeches:
    return Speeches(FAST, len(FAST), Speech(base_renderer(FAST), EOS), frozenset({0}))


def own(template: str | None = None, **fields: Any) -> OwnText:
    return OwnText(**({"template": template, "tokens": (), "eos_ids": (), "added": ()} | fields))


def test_an_own_template_renders_and_its_marks_are_its_own() -> None:
    all_ = speeches()
    speech = all_.of(
        own("[{{ eos_token }}] {{ messages[0].content }}", tokens=(("eos_token", "<|endoftext|>"),))
    )
    assert speech.own
    assert speech.renderer is not None
    ids = speech.renderer.prompt([{"role": "user", "content": "so <|im_end|>"}])
    assert FAST.decode(ids) == "[<|endoftext|>] so <|im_end|>"
    assert 2 not in ids
    assert speech.eos == {0}
    all_.close()


def test_the_bases_own_template_is_no_other() -> None:
    all_ = speeches()
    same = own(FAST.chat_template, tokens=(("eos_token", FAST.eos_token),))
    assert all_.of(None) is all_.base
    assert all_.of(same) == Speech(all_.base.renderer, frozenset({0, 2}))


def test_ends_are_the_folders_where_it_names_them_and_else_the_bases() -> None:
    all_ = speeches()
    assert all_.of(own(eos_ids=(1,))).eos == {1, FAST.eos_token_id}
    assert all_.of(own(tokens=(("eos_token", "<|endoftext|>"),))).eos == {0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (own(tokens=(("eos_token", "<|eot|>"),)), r"eos_token is '<\|eot\|>', which is no token of the base"),
        (own(eos_ids=(512,)), "token 512, but the base's vocabulary has 512"),
        (own("<|eot|>{{ 1 }}", added=((600, "<|eot|>"),)), r"writes '<\|eot\|>', .* another vocabulary"),
        (own("<|im_end|>{{ 1 }}", added=((600, "<|im_end|>"),)), "another vocabulary"),
        (own("{% if %}"), "cannot be used"),
        (own("{{ raise_exception('never') }}"), "cannot be used: never"),
    ],
)
def test_what_the_base_cannot_speak_is_refused(text: OwnText, reason: str) -> None:
    all_ = speeches()
    with pytest.raises(AdapterUnsupported, match=reason):
        all_.check(text)
    all_.close()


def test_tokens_that_the_template_does_not_write_do_no_harm() -> None:
    all_ = speeches()
    all_.check(own("{{ messages[0].content }}", added=((600, "[PAD]"), (2, "<|im_end|>"))))
    all_.close()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "it renders nothing. Mend it"),
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate. Mend it"),
    ],
)
def test_a_template_that_cannot_render_a_greeting_is_refused(template: str, reason: str) -> None:
    all_ = speeches()
    with pytest.raises(AdapterUnsupported, match=reason):
        all_.check(own(template))
    all_.close()
