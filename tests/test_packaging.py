"""The set-up of a new clone: pinned versions, the wheel, the Makefile, the container image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.project import (
    DIRECT,
    PROJECT,
    ROOT,
    defaults,
    instructions,
    last_environment,
    make,
    stages,
)

ROOT_FOLDERS = (".ci", ".github", "adapters", "deploy", "docs", "server", "tests")
ROOT_FILES = (
    *("*.py", "*.toml", "*.txt", "*.in", "*.md", "Dockerfile", "LICENSE", "Makefile"),
    *(".clang-format", ".dockerignore", ".pre-commit-config.yaml"),
)
UNPACKED = {".gitignore"}
"""Versioned files that are useful only in a checkout."""
BUILT = ("__pycache__", "*.so")


def pins() -> dict[str, Version]:
    """The versions in ``constraints.txt`` by name. Fails on a line that is not ``name==version``."""
    pinned: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pinned[canonicalize_name(name)] = Version(version)
    return pinned


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_direct_dependencies_are_pinned_within_their_ranges(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_each_dependency_is_declared_once() -> None:
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    names = [canonicalize_name(Requirement(line).name) for line in lines]
    assert sorted(names) == sorted(set(names))


def test_no_pin_is_only_for_one_kind_of_machine() -> None:
    assert [name for name, version in pins().items() if version.local] == []


def test_indirect_dependencies_are_pinned() -> None:
    """Covers every installed dependency, except those that their parent pins (as torch pins CUDA)."""
    assert {requirement.name for requirement in closure(DIRECT)} - pins().keys() == set()


def closure(wanted: list[Requirement]) -> Iterator[Requirement]:
    seen: set[str] = set()
    stack = list(wanted)
    while stack:
        requirement = stack.pop()
        requirement.name = canonicalize_name(requirement.name)
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        yield requirement
        stack += needed_by(requirement)


def needed_by(parent: Requirement) -> Iterator[Requirement]:
    try:
        lines = requires(parent.name) or []
    except PackageNotFoundError:
        pytest.skip(f"{parent.name} is not installed here")
    for line in lines:
        child = Requirement(line)
        extras = parent.extras | {""}
        applies = child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras)
        if applies and not str(child.specifier).startswith("=="):
            yield child


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the versioned files, so that building changes nothing in the checkout."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in ROOT_FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns(*BUILT))
    for pattern in ROOT_FILES:
        for file in ROOT.glob(pattern):
            shutil.copy(file, copy)
    return copy


def test_sdist_and_wheel_are_complete(sources: Path, tmp_path: Path) -> None:
    """The sdist has only our files and those that setuptools adds. The wheel is built from it, as pip does.

    It runs without a compiler, because the compiled kernels are optional and take time.
    """
    expected = files_in(sources)
    build = [
        sys.executable,
        "-c",
        "import sys; from setuptools import build_meta as b; b.build_sdist(sys.argv[1])",
    ]
    subprocess.run([*build, tmp_path], cwd=sources, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        sdist.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    added = re.compile(r"PKG-INFO|setup\.cfg|[^/]*\.egg-info/.*")
    assert {name for name in files_in(unpacked) if not added.fullmatch(name)} == expected

    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    environ = {**os.environ, "CC": "false", "CXX": "false"}
    subprocess.run([*wheel, "--wheel-dir", tmp_path, unpacked], env=environ, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as packed:
        names = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert names == {name for name in expected if name.startswith(("adapters/", "server/"))}
    assert {"adapters/py.typed", "server/py.typed"} <= names


def test_all_versioned_files_are_packed(sources: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    versioned = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    assert versioned - files_in(sources) == UNPACKED


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_help_names_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert [line.split()[1] for line in make("help").splitlines()] == phony[1].split()


def test_an_environment_is_created_and_installed_once(tmp_path: Path) -> None:
    plan = make("--dry-run", "serve", f"VENV={tmp_path}")
    steps = [plan.index(step) for step in ("-m venv", "pip install", "manylora serve")]
    assert steps == sorted(steps)
    (tmp_path / "bin").mkdir()
    for made in ("bin/pip", ".installed"):
        (tmp_path / made).touch()
    plan = make("--dry-run", "serve", f"VENV={tmp_path}")
    assert "manylora serve" in plan
    assert "pip install" not in plan


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(changed: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for made in ("bin/pip", ".installed", ".installed-dev"):
        (tmp_path / made).touch()
    for target in ("serve", "test"):
        assert "pip install" in make("--dry-run", f"--what-if={changed}", target, f"VENV={tmp_path}")


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    hide = "import sys; sys.version_info, sys.version = (3, 10, 1), '3.10.1 (main)'"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{hide}; exec(sys.argv[1])" "$2"\n')
    old.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make("serve", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    said = [line for line in refused.value.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert "3.11" in said[0]
    assert "3.10.1" in said[0]
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("home", ["state", "state of mine"])
def test_samples_are_copied_once(home: str, tmp_path: Path) -> None:
    adapters = tmp_path / home / "adapters"
    samples = {path.parent.name for path in ROOT.glob("adapters/samples/*/adapter_config.json")}
    make("samples", MANYLORA_HOME=str(tmp_path / home))
    assert {path.name for path in adapters.iterdir()} == samples
    kept = adapters / min(samples)
    (kept / "adapter_config.json").write_text("the operator's own")
    make("samples", MANYLORA_HOME=os.path.relpath(tmp_path / home, ROOT))
    assert (kept / "adapter_config.json").read_text() == "the operator's own"
    assert {path.name for path in adapters.iterdir()} == samples


def test_the_image_for_cpus_is_the_default() -> None:
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_unprivileged_with_their_state_in_a_volume(target: str) -> None:
    last = dict(instructions(target))
    assert last["USER"].isdigit()
    assert last["USER"] != "0"
    assert last["VOLUME"] == last["WORKDIR"] == "/var/lib/manylora"
    assert "MANYLORA_HOME=/var/lib/manylora" in last_environment(target)
    assert "MANYLORA_HOST=0.0.0.0" in last_environment(target)
    assert json.loads(last["ENTRYPOINT"]) == ["manylora"]
    assert json.loads(last["CMD"]) == ["serve"]


def test_only_the_cuda_image_may_have_flash_attn() -> None:
    """flash-attn takes long to compile, so it is installed only on request."""
    assert ("ARG", "FLASH_ATTN=without") in defaults()
    assert stages()["flash-attn"][0] == "flash-attn-${FLASH_ATTN}"
    assert not any("flash-attn" in rest for _, rest in instructions("flash-attn-without"))
    assert any("pip wheel" in rest and "flash-attn" in rest for _, rest in instructions("flash-attn-with"))
    assert "from=flash-attn" in str(instructions("build-cuda"))
    assert "flash-attn" not in str(instructions("build-cpu"))
    for target in ("cpu", "cuda"):
        assert f"--from=build-{target} /opt/manylora /opt/manylora" in dict(instructions(target))["COPY"]


@pytest.mark.parametrize(("status", "well"), [(200, True), (503, False)])
def test_the_health_check_reports_the_servers_state(status: int, well: bool) -> None:
    """Runs the image's command with servers that report different states."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

    command = json.loads(dict(instructions("cpu"))["HEALTHCHECK"].partition("CMD ")[2])
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        environ = {**os.environ, "MANYLORA_PORT": str(server.server_port)}
        check = subprocess.Popen([sys.executable, *command[1:]], env=environ, stderr=subprocess.DEVNULL)
        server.handle_request()
        assert (check.wait() == 0) is well
