from __future__ import annotations

from typing import Any

import pytest

from tests.support.training_tasks import make_task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Fields of a ``TrainConfig`` on a tiny Llama, quantised once for all tests."""
    return make_task(tmp_path_factory.mktemp("training"))
