"""Where the run is reported besides its own event log, and where it lies."""

from __future__ import annotations

from typing import Literal

from ._base import PathText, Section


class TrackingSection(Section):
    """Trackers, by the names that transformers uses; none by default."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that also get every logged number."""
    project: str = "tunesmith"
    """The project's name at the tracker."""


class OutputSection(Section):
    """Where the run directory lies."""

    dir: PathText | None = None
    """The run directory; derived as runs/NAME under the current folder."""
