"""A template from an unknown author cannot block the server or use up its memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapters.text.sandbox import SandboxedTemplate, TemplateSandbox, TemplateTooSlow
from adapters.text.template import ChatTemplate, TemplateRefused
from tests.support.tiny_models import tiny_tokenizer

ASKED = [{"role": "user", "content": "é tile"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[TemplateSandbox]:
    sandbox = TemplateSandbox(2)
    yield sandbox
    sandbox.close()


def render(sandbox: TemplateSandbox, source: str, **variables: str) -> str:
    return SandboxedTemplate(source, variables, sandbox).render(ASKED, add_generation_prompt=True)


def test_the_sandbox_renders_what_the_server_renders(sandbox: TemplateSandbox) -> None:
    source = tiny_tokenizer().chat_template + "{{ bos_token }}{{ messages | tojson }}"
    here = ChatTemplate(source, {"bos_token": "<s>"}).render(ASKED, add_generation_prompt=True)
    assert render(sandbox, source, bos_token="<s>") == here


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' * 10 ** 10 }}", "it takes more than 512 MiB"),
        ("{{ 'x' * 10 ** 8 }}", "at most"),
    ],
)
def test_a_failure_to_render_has_a_reason(sandbox: TemplateSandbox, source: str, reason: str) -> None:
    with pytest.raises(TemplateRefused, match=reason):
        render(sandbox, source)
    assert render(sandbox, "{{ messages[0].content }}") == "é tile"


def test_an_endless_template_is_killed_and_others_continue(sandbox: TemplateSandbox) -> None:
    render(sandbox, "a")
    with ThreadPoolExecutor(1) as threads:
        began = time.monotonic()
        hostile = threads.submit(render, sandbox, ENDLESS)
        assert render(sandbox, "b") == "b"
        assert not hostile.done(), "the other template waited for the endless one"
        with pytest.raises(TemplateRefused, match=r"takes more than 2 s"):
            hostile.result()
        assert time.monotonic() - began < 30
    with pytest.raises(TemplateRefused, match="in a minute"):  # refused at once, without rendering
        render(sandbox, ENDLESS)
    assert render(sandbox, "c") == "c"


def test_a_killed_template_is_tried_again_later(
    sandbox: TemplateSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox._refuse("{{ 1 }}")
    with pytest.raises(TemplateRefused):
        render(sandbox, "{{ 1 }}")
    now = time.monotonic()
    monkeypatch.setattr("adapters.text.sandbox.time.monotonic", lambda: now + 61)
    assert render(sandbox, "{{ 1 }}") == "1"


def test_the_sandbox_has_no_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYLORA_API_KEY", "sesame")
    sandbox = TemplateSandbox(1)
    render(sandbox, "a")
    process = sandbox._all[0]._process
    assert process is not None
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"sesame" not in file.read()
    sandbox.close()
    assert not os.path.exists(f"/proc/{process.pid}")


def test_a_template_is_not_blocked_after_a_short_try(sandbox: TemplateSandbox) -> None:
    endless = SandboxedTemplate(ENDLESS + " ", {}, sandbox)
    for _ in range(2):
        with pytest.raises(TemplateTooSlow) as raised:
            sandbox.render(endless, ASKED, True, seconds=0.2)
        assert "in a minute" not in str(raised.value)


def test_many_open_connections_do_not_matter() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1300
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip("this machine allows few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    opened: list[int] = []
    try:
        while not opened or opened[-1] < 1100:
            opened.append(os.open(os.devnull, os.O_RDONLY))
        sandbox = TemplateSandbox(1)
        assert render(sandbox, "{{ messages[0].content }}") == "é tile"
        sandbox.close()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
