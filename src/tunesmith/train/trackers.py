"""Trackers by name (tensorboard, wandb, trackio), through Accelerate; every logged number goes to each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..recipe import TrackingSection


class Trackers:
    """The trackers that a recipe names; none by default. Each logs below the run's folder."""

    def __init__(self, section: TrackingSection, run_name: str, folder: Path, config: dict[str, Any]):
        self._trackers = []
        if not section.report_to:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

        available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
        for name in section.report_to:
            if not available[name]():
                raise RecipeError(f"the tracker {name} is not installed", where="tracking.report_to", mend=f"pip install {name}")
            tracker = LOGGER_TYPE_TO_CLASS[name](section.project, **_options(name, run_name, folder))
            tracker.start()
            tracker.store_init_configuration(_flat(config))
            self._trackers.append(tracker)

    def log(self, event: dict[str, Any]) -> None:
        """Passes on an event's numbers, at its step."""
        numbers = {
            f"{event.get('stage', 'run')}/{k}": v for k, v in event.items() if isinstance(v, int | float) and k not in ("step", "time")
        }
        for tracker in self._trackers if "step" in event and numbers else []:
            tracker.log(numbers, step=event["step"])

    def finish(self) -> None:
        """Closes every tracker."""
        for tracker in self._trackers:
            tracker.finish()


def _options(name: str, run_name: str, folder: Path) -> dict[str, Any]:
    if name == "tensorboard":
        return {"logging_dir": str(folder / "tensorboard")}
    return {"name": run_name, "dir": str(folder)} if name == "wandb" else {"name": run_name}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value if isinstance(value, int | float | str | bool) else str(value)}
