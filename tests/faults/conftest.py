"""The two forms of the fault plan (short, or --whole), the account of their runs, and what the tests of training share."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.plan import Runs
from tests.faults.stages import Stages
from tests.toys import model_folder

from tunesmith.models.load import load_model
from tunesmith.recipe import ModelSection

MADE, HELD = Counter(), Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where pytest is given this folder."""
    group = parser.getgroup("faults")
    group.addoption("--whole", action="store_true", help="every run of the fault plan, and not a few of each fault")
    group.addoption("--account", metavar="FILE", help="write the runs that were made and that held, by fault, as JSON")


@pytest.fixture
def fault(request):
    """`fault(NAME)` gives the `Runs` of a fault of the plan."""
    given: list[Runs] = []

    def runs(name: str) -> Runs:
        given.append(Runs(name, request.node.name, whole=bool(request.config.getoption("--whole", default=False))))
        return given[-1]

    yield runs
    request.node.user_properties.extend(("fault", [runs.fault, runs.made, runs.held]) for runs in given)


def pytest_runtest_logreport(report: Any) -> None:
    """Adds up what the tests did, in this process or in another."""
    if report.when == "teardown":
        for name, value in report.user_properties:
            if name == "fault":
                MADE[value[0]] += value[1]
                HELD[value[0]] += value[2]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the account."""
    file = session.config.getoption("--account", default=None)
    if file and not hasattr(session.config, "workerinput"):
        Path(file).write_text(json.dumps({name: {"made": MADE[name], "held": HELD[name]} for name in MADE}))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny Llama with a language head of its own, warm in this process; in a folder too, since a result names its base."""
    torch.set_num_threads(1)
    folder = model_folder(tmp_path_factory.mktemp("base") / "llama", tied=False)
    return load_model(ModelSection(name=str(folder), dtype="float32"))


@pytest.fixture(scope="session")
def stages(warm, base, tmp_path_factory) -> Stages:
    """Every objective and method at work on it."""
    return Stages(base, tmp_path_factory.mktemp("stages"))
