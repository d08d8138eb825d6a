"""Trackers by name (tensorboard, wandb, trackio), through Accelerate; every logged number goes to each of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import RecipeError, TunesmithError
from ..recipe import TrackingSection


def require_trackers(section: TrackingSection) -> None:
    """Raises RecipeError for a tracker that is not installed, before anything is loaded."""
    if not section.report_to:
        return
    from accelerate.utils import is_tensorboard_available, is_trackio_available, is_wandb_available

    available = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available, "trackio": is_trackio_available}
    for name in section.report_to:
        if not available[name]():
            raise RecipeError(f"the tracker {name} is not installed", where="tracking.report_to", mend=f"pip install {name}")


class Trackers:
    """The trackers that a recipe names; none by default. A context: at its end every tracker is closed, whatever happened. One that fails
    on the way is named in a warning and gets no more numbers; the training goes on.

    steps: each stage's updates, in order; a tracker counts on through all stages, since wandb takes no step twice.
    """

    def __init__(self, section: TrackingSection, run_name: str, folder: Path, config: dict[str, Any], steps: Mapping[str, int]):
        self._trackers: list[Any] = []
        self._failed: list[Any] = []
        self._before: dict[str, int] = {}
        for stage in steps:
            self._before[stage] = sum(steps[earlier] for earlier in self._before)
        require_trackers(section)
        for name in section.report_to:
            self._trackers.append(_started(name, section.project, _options(name, run_name, folder), _flat(config)))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception: object) -> None:
        with redirect_stdout(sys.stderr):  # what a tracker says; standard output is the result's
            for tracker in self._trackers:
                try:
                    _finish(tracker)
                except TunesmithError:
                    raise
                except Exception as error:
                    warnings.warn(f"the tracker {tracker.name} could not be closed: {error}", stacklevel=2)

    def log(self, event: dict[str, Any]) -> None:
        """Passes on the numbers of a training step or of an evaluation on the validation rows, at its step."""
        if event.get("event", "evaluated") != "evaluated" or event.get("stage") not in self._before:
            return
        stage = event["stage"]
        numbers = {f"{stage}/{key}": value for key, value in event.items() if _is_number(value) and key not in ("step", "time")}
        for tracker in [tracker for tracker in self._trackers if tracker not in self._failed]:
            try:
                tracker.log(numbers, step=self._before[stage] + event["step"])
            except TunesmithError:  # a signal
                raise
            except Exception as error:  # each tracker raises kinds of its own; a training is worth more than its curve elsewhere
                self._failed.append(tracker)
                warnings.warn(f"the tracker {tracker.name} failed and gets no more numbers: {error}", stacklevel=2)


def _started(name: str, project: str, options: dict[str, Any], config: dict[str, Any]) -> Any:
    """Raises TunesmithError where the tracker itself does not start: no key, no network."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process they are in
    try:
        with redirect_stdout(sys.stderr):
            tracker = LOGGER_TYPE_TO_CLASS[name](project, **options)
            tracker.start()
            tracker.store_init_configuration(config)
    except TunesmithError:  # a signal
        raise
    except Exception as error:  # each tracker raises kinds of its own
        raise TunesmithError(
            f"the tracker {name} did not start: {error}", where="tracking.report_to", mend="mend its settings, or take it out of the recipe"
        ) from error
    return tracker


def _finish(tracker: Any) -> None:
    if tracker.name == "trackio":  # accelerate closes the run only, and trackio closes it again, in words, at this process's end
        import trackio

        trackio.finish()
    else:
        tracker.finish()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _options(name: str, run_name: str, folder: Path) -> dict[str, Any]:
    if name == "tensorboard":
        return {"logging_dir": str(folder / "tensorboard")}
    return {"name": run_name, "dir": str(folder)} if name == "wandb" else {"name": run_name}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value if isinstance(value, int | float | str | bool) else str(value)}
