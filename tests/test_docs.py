"""The links, files, options, commands, routes, fields and errors in the README and ``docs`` exist."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from server.cli import _parser
from server.config import from_args
from server.config.options import OPTIONS
from server.http import app
from server.http.errors import SHAPES
from tests.api_docs import PAGE, with_tables
from tests.support.project import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHERS = re.compile(
    r"^ *(?:docker|kubectl|accelerate|pip|git) .*$|`(?:docker|kubectl|accelerate|pip|git) [^`]*`", re.M
)
"""Other programs, whose options are not checked."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@each_page
def test_files_exist(page: Path) -> None:
    for path in re.findall(r"`((?:adapters|server|tests|deploy|docs)/[^`\s]*)`", text_of(page)):
        assert list(ROOT.glob(path)), path


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser, and those of all its commands."""
    yield parser
    for each in kinds(parser).values():
        yield from commands(each)


def kinds(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's commands by name."""
    choices = [each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return dict(choices[0]) if choices else {}


@each_page
def test_options_exist(page: Path) -> None:
    known = {option for each in commands(_parser(bench=True)) for option in each._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", OF_OTHERS.sub("", text_of(page)))) <= known


@each_page
def test_variables_exist(page: Path) -> None:
    named = set(re.findall(r"MANYLORA_[A-Z_]*[A-Z]", text_of(page)))
    assert named <= {option.variable for option in OPTIONS}


def lines_of_shell(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text_of(page), re.M | re.S)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


@each_page
def test_command_lines_parse(page: Path) -> None:
    for line in lines_of_shell(page):
        words = shlex.split(line, comments=True)
        if words and words[0] in ("manylora", ".venv/bin/manylora"):
            command, _, passed_on = shlex.join(words[1:]).partition(" -- ")
            parses(shlex.split(command))
            from_args(shlex.split(passed_on), {})


def parses(words: Sequence[str]) -> None:
    if words[0] == "serve":
        from_args(words[1:], {})
    _parser(bench=True).parse_args(words)  # exits if it does not accept them


@each_page
def test_commands_named_in_text_exist(page: Path) -> None:
    for named in re.findall(r"`(?:\.venv/bin/)?manylora ((?:[a-z][a-z-]*(?: |`))+)", text_of(page)):
        parser = _parser(bench=True)
        for word in named.rstrip("`").split():
            parser = kinds(parser)[word]


def rows_below(heading: str, page: str = "api.md") -> list[list[str]]:
    """The cells of the first table below a heading, without its header."""
    below = re.split(rf"^#+ {re.escape(heading)}$", text_of(ROOT / "docs" / page), flags=re.M)[1]
    table = re.search(r"^\|.*?\n(?!\|)", below, re.M | re.S)
    assert table is not None
    lines = [line for line in table[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_routes_are_the_apps() -> None:
    groups = {
        "anyone": app.PROBE_ROUTES,
        "client": app.CLIENT_ROUTES,
        "metrics": app.METRICS_ROUTES,
        "training": app.TRAINING_ROUTES,
        "admin": app.ADMIN_ROUTES,
    }
    routes = [
        [f"`{method} {path.replace(':path', '')}`", name]
        for name, rows in groups.items()
        for method, path, _ in rows
    ]
    assert [row[:2] for row in rows_below("Endpoints")] == routes


def test_the_fields_are_those_of_the_code() -> None:
    page = text_of(PAGE)
    assert with_tables(page) == page, "run python -m tests.api_docs"


def test_the_errors_are_those_of_the_code() -> None:
    known = {(str(shape.status), shape.type, shape.code) for shape in SHAPES.values() if shape.code}
    listed = [(status, kind.strip("`"), code.strip("`")) for status, kind, code, *_ in rows_below("Errors")]
    assert len(listed) == len(set(listed))
    assert set(listed) == known


def test_the_metrics_named_exist() -> None:
    """Each name, without its prefix and Prometheus' suffixes, is a word in the files that define metrics."""
    sources = [ROOT / "server/http/metrics.py", ROOT / "server/finetune/jobs/metrics.py"]
    source = "\n".join(text_of(path) for path in sources)
    for name in re.findall(r"\bmanylora_([a-z_]+)", text_of(ROOT / "docs" / "operations.md")):
        stem = re.sub(r"_total$|_seconds$", "", name)
        assert f'"{stem}' in source or f'"manylora_{stem}' in source or _by_adapter(stem, source), name


def _by_adapter(stem: str, source: str) -> bool:
    return stem.startswith("adapter_") and f'"{stem.removeprefix("adapter_")}"' in source
