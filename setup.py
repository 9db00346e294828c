"""Builds the native kernels with the package; everything else is in pyproject.toml.

The library is plain C++ behind C functions, loaded with ctypes: no Python API, no torch. Without a compiler
the install goes on, and the server then uses torch's kernels, which is slower; it says so once at start.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path("adapters/kernels/cpu/src")
COMMON = [
    "-std=gnu++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # see simd.h
    "-Wno-psabi",
    "-Wno-ignored-attributes",
]
X86 = platform.machine() in ("x86_64", "AMD64")
# One file an instruction set, each with its own flags; which one runs is decided on the machine that runs it.
FLAGS: dict[str, list[str]] = {"isa_portable.cpp": [], "dispatch.cpp": []}
if X86:
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"]
    FLAGS |= {"isa_avx2.cpp": ["-mavx2", "-mfma"], "isa_avx512bf16.cpp": avx512}


class BuildNative(build_ext):  # type: ignore[misc]
    """Compiles each source with its flags and links them into one shared library."""

    def build_extension(self, ext: Extension) -> None:
        macros = [("MANYLORA_X86", "1")] if X86 else []
        objects = []
        for name, flags in FLAGS.items():
            objects += self.compiler.compile(
                [str(SOURCE / name)],
                self.build_temp,
                macros,
                extra_postargs=COMMON + flags,
                depends=ext.depends,
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-fopenmp"], target_lang="c++")


setup(
    ext_modules=[
        Extension(
            "adapters.kernels.cpu.kernels",
            sources=[str(SOURCE / name) for name in FLAGS],
            depends=[str(path) for path in sorted(SOURCE.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
