from __future__ import annotations

from typing import Any

import pytest

from tests.support.training_tasks import make_task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The fields of a ``TrainConfig`` on a tiny Llama, which is quantised once for all tests."""
    return make_task(tmp_path_factory.mktemp("training"))
