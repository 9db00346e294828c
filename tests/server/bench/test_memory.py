from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.bench.memory import memory_of, tree

HOLD = "x = bytearray(64 << 20); x[::4096] = b'1' * (64 << 8); {after}; print(flush=True); input()"


@pytest.mark.parametrize(("after", "low", "high"), [("0", 64, 128), ("del x", 0, 40)])
def test_a_process_memory_now_and_at_its_peak(after: str, low: int, high: int) -> None:
    command = [sys.executable, "-c", HOLD.format(after=after)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        figures = memory_of(child.pid)
        assert child.pid in tree(os.getpid())
        child.communicate(b"\n")
    assert 64 < figures["peak_memory_mib"] < 128
    assert low < figures["memory_mib"] < high


def test_a_tree_is_summed(tmp_path: Path) -> None:
    for pid, parent, name in ((10, 1, "server"), (11, 10, "a (b) c"), (12, 11, "leaf"), (13, 1, "other")):
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} ({name}) S {parent} 0 0")
        (folder / "status").write_text(f"Name:\t{name}\nVmHWM:\t {pid * 1024} kB\n")
        (folder / "smaps_rollup").write_text(f"0-1 ---p [rollup]\nRss: 9999 kB\nPss:   {pid * 512} kB\n")
    assert sorted(tree(10, tmp_path)) == [10, 11, 12]
    assert memory_of(10, tmp_path) == {"memory_mib": 33 / 2, "peak_memory_mib": 33}


def test_a_process_that_is_gone_has_no_memory(tmp_path: Path) -> None:
    assert memory_of(10, tmp_path) == {}
