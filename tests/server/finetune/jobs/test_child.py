from __future__ import annotations

import os
import subprocess
import sys

import pytest

from server.finetune.jobs.child import child_command

SAY = "import os; print(os.nice(0), os.sched_getscheduler(0) == os.SCHED_IDLE)"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the idle scheduling class")
@pytest.mark.parametrize(("nice", "idle"), [(7, "False"), (19, "True")])
def test_a_job_has_a_lower_priority_than_serving(nice: int, idle: str) -> None:
    said = subprocess.run(
        child_command([sys.executable, "-c", SAY], nice), capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == [str(min(19, os.nice(0) + nice)), idle]
