"""Files for contributors: hooks and issue forms are valid, and guides agree with the Makefile and options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config.options import OPTIONS
from tests.support.project import DIRECT, ROOT, make, tool

FORMS = ROOT / ".github/ISSUE_TEMPLATE"
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
HOOKS: Any = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))


def test_issue_forms_follow_the_schema() -> None:
    tool("check-jsonschema", "--builtin-schema", "vendor.github-issue-forms", *forms())
    tool("check-jsonschema", "--builtin-schema", "vendor.github-issue-config", FORMS / "config.yml")


def forms() -> list[Path]:
    return sorted(path for path in FORMS.iterdir() if path.name != "config.yml")


def test_hooks_are_valid() -> None:
    tool("pre-commit", "validate-config")


def test_hooks_download_nothing_and_run_the_tools_of_the_environment() -> None:
    assert [repository["repo"] for repository in HOOKS["repos"]] == ["local"]
    for hook in HOOKS["repos"][0]["hooks"]:
        command = Path(hook["entry"].split()[0])
        assert hook["language"] == "system"
        assert command.parent == Path(".venv/bin")
        assert command.name in {requirement.name for requirement in DIRECT}


def test_the_style_of_the_kernels_is_valid() -> None:
    tool("clang-format", "--dump-config", "--style=file")


@pytest.mark.parametrize("guide", ["CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_guides_name_targets_that_exist(guide: str) -> None:
    targets = {line.split()[1] for line in make("help").splitlines()}
    named = re.findall(r"^ *make ((?:[a-z]+ ?)+)|`make ((?:[a-z]+ ?)+)", text(guide), re.MULTILINE)
    words = {word for groups in named for word in " ".join(groups).split()}
    assert words
    assert words <= targets


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("guide", ["CHANGELOG.md", "SECURITY.md"])
def test_guides_name_options_that_exist(guide: str) -> None:
    """A code span that begins with ``--`` is an option of ``manylora serve``."""
    named = set(re.findall(r"`(--[a-z][a-z-]+)", text(guide)))
    assert named
    assert named <= {option.flag for option in OPTIONS}


def test_the_changelog_has_an_unreleased_section() -> None:
    kinds = re.split(r"^## ", text("CHANGELOG.md"), flags=re.MULTILINE)[1]
    assert kinds.startswith("[Unreleased]\n")
    assert set(re.findall(r"^### (.*)", kinds, re.MULTILINE)) <= KINDS
