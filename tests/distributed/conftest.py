"""What the runs of several processes are compared with: one process's, each made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.distributed.processes import Trained, train
from tests.distributed.work import WORK, stage_for


@pytest.fixture(scope="session", autouse=True)
def forked_from_a_warm_process(warm):
    """All processes of these tests are."""


@pytest.fixture(scope="session")
def alone(warm, tmp_path_factory) -> Callable[..., Trained]:
    """`alone(KIND, SETTINGS, rows=ROWS)`: the run of one process, with an evaluation on its own rows. Look at it, and change nothing."""
    made: dict[str, Trained] = {}

    def run(kind: str, settings: dict[str, Any] | None = None, *, rows: Any = None) -> Trained:
        rows = WORK[kind][1] if rows is None else rows
        key = repr((kind, settings, rows))
        if key not in made:
            folder = tmp_path_factory.mktemp("alone")
            made[key] = train(1, stage_for(kind, **(settings or {})), folder / "run", rows, validation=rows)
        return made[key]

    return run
