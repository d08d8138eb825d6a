"""One verb at work on one run directory: what its parts share and fill in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .data.prepare import PreparedData
from .data.template import ChatTemplate
from .models.load import LoadedModel
from .recipe import Recipe, Stage, virtual_tokens_of
from .rundir import RunDirectory
from .tasks import Tasks
from .train.memory import held_bytes, peak_memory_bytes
from .train.signals import StopRequest

Report = Callable[[dict[str, Any]], None]


@dataclass
class Session:
    """One verb at work on one run directory."""

    recipe: Recipe
    run: RunDirectory
    stop: StopRequest
    report: Report
    loaded: LoadedModel | None = None
    template: ChatTemplate | None = None
    new_tokens: list[int] = field(default_factory=list)
    data: PreparedData | None = None
    stage_data: dict[str, PreparedData] = field(default_factory=dict)
    tasks: Tasks | None = None
    stages: list[Stage] = field(default_factory=list)
    bare: int = field(default_factory=held_bytes)
    """Bytes held before there is a model."""
    worked: bool = False
    """Whether anything was trained or scored, and not only found finished."""

    @property
    def context(self) -> int:
        """Tokens that a row may have: the model's context without what learned tokens of a stage take of it."""
        return self.loaded.context - max(virtual_tokens_of(stage.method) for stage in self.stages or self.recipe.stages)

    def data_of(self, stage: Stage) -> PreparedData:
        """What a stage trains on: rows of its own, else the recipe's."""
        return self.stage_data.get(stage.name, self.data)

    def tell(self, event: dict[str, Any]) -> None:
        """Logs an event and shows it."""
        self.run.log(event)
        self.report(event)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a part of the run, for the report."""
        self.report({"event": "phase_started", "name": name})
        began = time.perf_counter()
        yield
        self.tell({"event": "phase", "name": name, "seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory_bytes()})
