"""Where a stage's time goes, for the report: before its updates, sampling, in updates, validating, and writing what lasts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from ..data.batching import Window
from .loop import Source

P = ParamSpec("P")
R = TypeVar("R")


class Account:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Counts what happens within."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def counted(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """The function, each call of which counts."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.of(name):
                return function(*args, **kwargs)

        return call


class CountedSource:
    """A source of windows the making of which counts."""

    def __init__(self, source: Source, account: Account):
        self.source, self.steps_per_epoch = source, source.steps_per_epoch
        self._window = account.counted("sample", source.window)

    def window(self, step: int) -> Window:
        """As the source's."""
        return self._window(step)

    def state(self) -> Mapping[str, torch.Tensor]:
        """As the source's."""
        return self.source.state()

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """As the source's."""
        self.source.load(state)
