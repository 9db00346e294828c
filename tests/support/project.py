"""Functions that read the project's own files: metadata, Makefile, Dockerfile; and run its linters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DIRECT = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
STATE_VARIABLES = ("MANYLORA_", "MAKE", "MFLAGS")


def make(*arguments: str, **variables: str) -> str:
    """The output of ``make``, without variables of a ``make`` that runs these tests."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(STATE_VARIABLES)}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout


Instructions = list[tuple[str, str]]


def stages() -> dict[str, tuple[str, Instructions]]:
    """The Dockerfile's stages by name: the parent of each stage and its instructions."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    found: dict[str, tuple[str, Instructions]] = {}
    for word, _, rest in (line.partition(" ") for line in lines if line):
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = (parent, [])
        elif found:
            found[name][1].append((word, rest.strip()))
    return found


def defaults() -> Instructions:
    """The build arguments before the first stage."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("\nFROM ")[0]
    return [
        (word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word == "ARG"
    ]


def instructions(target: str) -> Instructions:
    """All instructions of the image ``target``. Those of its parents come first."""
    parent, own = stages()[target]
    return (instructions(parent) if parent in stages() else []) + own


def last_environment(target: str) -> list[str]:
    return [pair for word, rest in instructions(target) if word == "ENV" for pair in rest.split()]


def tool(name: str, *arguments: str | Path) -> None:
    """Run a linter that is installed beside Python. Fails with the linter's output."""
    command = [Path(sys.executable).with_name(name), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
