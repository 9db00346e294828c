"""The layers of the code: which folder may import which. The tests read the imports.

Imports under ``if TYPE_CHECKING:`` are for type checkers only and do not count. Imports inside a function
count, because they run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.project import ROOT

SCHEDULING = (
    "server/engine/kv_cache.py",
    "server/engine/lanes.py",
    "server/engine/fairness.py",
    "server/engine/preemption.py",
    "server/engine/scheduler.py",
    "server/engine/step.py",
    "server/engine/sequence.py",
    "adapters/pool/free_runs.py",
    "adapters/pool/row_allocator.py",
    "adapters/registry.py",
)
"""The scheduler's state: integers, lists and names, without tensors."""
RULES = [
    ("adapters/**/*.py", ("server",)),
    ("server/engine/**/*.py", ("server.http", "starlette", "uvicorn")),
    ("server/finetune/**/*.py", ("server.http", "starlette", "uvicorn")),
    ("server/http/**/*.py", ("torch",)),
    ("server/config/**/*.py", ("torch", "server.engine", "server.http")),
    *((path, ("torch",)) for path in SCHEDULING),
    ("tests/support/**/*.py", ("tests.adapters", "tests.server", "tests.e2e", "tests.costs", "tests.fuzz")),
]


def imports_of(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that ``tree`` imports at run time. Relative imports start from ``package``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from imports_of(ast.Module([other], []), package)
        else:
            yield from imports_of(node, package)


def broken(path: Path, forbidden: tuple[str, ...]) -> list[str]:
    """The imports of the file that lie in one of the ``forbidden`` packages."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names = imports_of(ast.parse(path.read_text("utf-8")), package)
    return [name for name in names if any(name == each or name.startswith(f"{each}.") for each in forbidden)]


@pytest.mark.parametrize(("pattern", "forbidden"), RULES)
def test_a_folder_imports_no_folder_above_it(pattern: str, forbidden: tuple[str, ...]) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files, f"{pattern} matches no file"
    found = {str(path.relative_to(ROOT)): names for path in files if (names := broken(path, forbidden))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch import Tensor",
        "def late():\n    from torch.nn import Module",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import torch",
    ],
)
def test_every_kind_of_import_is_found(source: str) -> None:
    assert any(name.split(".")[0] == "torch" for name in imports_of(ast.parse(source), "server.http"))


def test_relative_imports_and_type_checking() -> None:
    tree = ast.parse("from .. import http\nfrom .lanes import Lane\nif TYPE_CHECKING:\n    import torch")
    assert list(imports_of(tree, "server.engine")) == [
        "server",
        "server.http",
        "server.engine.lanes",
        "server.engine.lanes.Lane",
    ]


def test_the_folders_of_tests_mirror_those_of_the_code() -> None:
    for tests in (path.parent for path in (ROOT / "tests").glob("*/**/test_*.py")):
        mirrored = tests.relative_to(ROOT / "tests")
        if mirrored.parts[0] in ("adapters", "server"):
            assert (ROOT / mirrored).is_dir(), f"{mirrored} is a folder of tests only"


def test_no_test_module_is_imported() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        names = imports_of(ast.parse(path.read_text("utf-8")), ".".join(path.relative_to(ROOT).parent.parts))
        modules = {name for name in names if name.startswith("tests.")}
        assert not any(part.startswith("test_") for name in modules for part in name.split(".")), path
