"""A recipe run over a grid of settings, on one rendering of its data, and compared on one page.

    sweep("recipe.yaml", ["stages.0.learning_rate=1e-4,3e-4", "seed=0,1,2"])   # six runs, runs/NAME-sweep/sweep.json and sweep.html

Settings that differ in more than the seed are ranked by the validation loss of the last stage, its mean over the seeds: the test rows stay
what they are, unseen by any choice. A run that fails ends itself alone.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Interrupted, OtherSettings, OutputInUse, RecipeError, RunsFailed, TunesmithError
from .launch import starts_others
from .pipeline import run as run_recipe
from .preparation import require_files
from .recipe import Recipe, load_recipe
from .report.sweep import render_sweep
from .rundir import RunDirectory, make_folder, read_events, world, write_json, write_text

MAX_RUNS = 1000  # more is a mistake in the words
# Settings under which the loss is another measure: of what samples, the held-out answers are sampled under them.
CHANGES_THE_LOSS = re.compile(r"(^|\.)((objective|data|model|task)(\.|$)|rollout(\.(temperature|top_p|top_k|max_new_tokens))?$)")
# Objectives whose loss hangs on nothing that was trained before: they have no reference, and no reward model scores their answers.
ABSOLUTE = ("sft", "reward", "simpo", "orpo", "cpo")
OWN = ("name", "output", "output.dir")  # settings that would name a run or its folder
RESULT, PAGE = "sweep.json", "sweep.html"
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class SweepResult:
    """path: the sweep's folder; runs: one a combination, as in sweep.json; failed: those that ended in an error, with its words; best: the
    settings chosen, or None with the reason in `why`."""

    path: Path
    runs: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    best: dict[str, Any] | None
    why: str
    page: Path


def sweep(
    recipe: str | Path | dict[str, Any] | Recipe,
    axes: Sequence[str],
    *,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    report: Report = lambda event: None,
) -> SweepResult:
    """Runs every combination of the axes and writes sweep.json and sweep.html beside the runs.

    axes: `key=value,value,...` each; a value with a comma of its own stands in brackets, braces or quotes. out: the sweep's folder, else
    runs/NAME-sweep; each run is a folder in it. resume: finished runs are kept, the others go on, failed ones too. Raises RecipeError or
    MissingFile before anything is run where an axis or a combination is not usable, OutputInUse, Interrupted, and where every run fails
    what the first one raised.

    >>> tunesmith.sweep("recipes/quickstart.yaml", ["seed=0,1"]).best  # doctest: +SKIP
    """
    grid = _grid(axes)
    combinations = list(itertools.product(*([(key, value) for value in values] for key, values in grid)))
    first = load_recipe(recipe, sets)
    if world() > 1 or starts_others(first.launch):
        raise RecipeError("a sweep runs in one process, and this recipe takes several", where="launch", mend="sweep with launch left out")
    folder = Path(out) if out is not None else Path("runs") / f"{first.name}-sweep"
    if folder.is_dir() and any(folder.iterdir()) and not (resume and (folder / RESULT).is_file()):
        raise OutputInUse(
            "the folder holds something already", where=str(folder), mend="add --resume to go on with a sweep, or choose another --out"
        )
    _require_same_axes(folder / RESULT, grid)
    words = [[f"{key}={value}" for key, value in combination] for combination in combinations]
    for chosen in words:
        try:
            require_files(load_recipe(recipe, [*sets, *chosen]))
        except RecipeError as error:
            raise RecipeError(error.what, where=_as_swept(error.where, dict(grid)), mend=error.mend) from None
    names = [_slug(combination) for combination in combinations]
    if len(set(names)) < len(names):
        raise RecipeError("two combinations would share a folder", where="--sweep", mend="shorten the values")
    make_folder(folder)
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    errors: list[TunesmithError] = []
    other = _other_measures([key for key, _ in grid], first)
    if not (folder / RESULT).is_file():
        write_json(folder / RESULT, _summary(grid, done, failed, other))
    order = sorted(zip(names, combinations, words, strict=True), key=lambda one: not (folder / one[0]).is_dir())
    for number, (name, combination, chosen) in enumerate(order, 1):
        report({"event": "sweeping", "run": name, "number": number, "of": len(combinations)})
        try:
            if done:
                _share_tokens(folder / done[0]["name"], folder / name)
            result = run_recipe(recipe, sets=[*sets, *chosen], out=folder / name, resume=True, report=report)
            done.append(_account(name, dict(combination), result))
        except Interrupted:
            raise
        except TunesmithError as error:
            if isinstance(error, OtherSettings):  # of what is there, which came first: its table stays
                raise
            errors.append(copy.copy(error))  # without the traceback, which would hold the run's model
            failed.append({"name": name, "settings": dict(combination), "error": error.to_json()})
            report({"event": "run_failed", "run": name, "error": str(error)})
        summary = _summary(grid, done, failed, other)
        write_json(folder / RESULT, summary)
        write_text(folder / PAGE, render_sweep(first.name, summary))
    if not done:
        raise errors[0]
    return SweepResult(folder, done, failed, summary["best"], summary["why"], folder / PAGE)


def _require_same_axes(result: Path, grid: Sequence[tuple[str, list[str]]]) -> None:
    """A sweep that goes on names all that the folder's was over, so that no run is lost from its table. Raises RecipeError."""
    try:
        before = dict(json.loads(result.read_text())["axes"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = dict(grid)
    if before.keys() == now.keys() and all(set(values) <= set(now[key]) for key, values in before.items()):
        return
    axes = " ".join(f"--sweep {shlex.quote(f'{key}=' + ','.join(values))}" for key, values in before.items())
    raise RecipeError(
        "the folder holds a sweep over other values",
        where=str(result),
        mend=f"go on with {axes}, and more values if you like; or choose another --out",
    )


def require_all(result: SweepResult) -> None:
    """Raises RunsFailed where a run failed."""
    if result.failed:
        names = "; ".join(one["name"] for one in result.failed)
        raise RunsFailed(
            f"{len(result.failed)} of {len(result.runs) + len(result.failed)} runs failed: {names}",
            where=str(result.path / RESULT),
            mend="each reason stands there; mend it and add --resume: these runs are tried again, the others kept; or sweep without them",
        )


def _grid(axes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The keys and their values. Raises RecipeError where a key stands twice or would name the runs, and of too many combinations."""
    grid = [parse_axis(axis) for axis in axes]
    keys = [key for key, _ in grid]
    if twice := [key for key in dict(grid) if keys.count(key) > 1]:
        raise RecipeError(f"`{twice[0]}` is swept twice", where="--sweep", mend=f"put its values together: --sweep {twice[0]}=A,B")
    if own := [key for key in keys if key in OWN]:
        raise RecipeError(
            f"a sweep names its runs and their folders itself, not by `{own[0]}`",
            where="--sweep",
            mend="leave it out; --out DIR is the sweep's folder",
        )
    if (count := math.prod(len(values) for _, values in grid)) > MAX_RUNS:
        raise RecipeError(f"{count} runs", where="--sweep", mend=f"at most {MAX_RUNS}: leave values out")
    return grid


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`key=a,b` as the key and its values, in YAML as for --set. Raises RecipeError.

    >>> parse_axis("stages.0.learning_rate=1e-4,3e-4")
    ('stages.0.learning_rate', ['1e-4', '3e-4'])
    """
    key, equals, rest = text.partition("=")
    values = [value.strip() for value in _split(rest)]
    if not equals or not key or not all(values):
        raise RecipeError("not of the form key=value,value", where=f"--sweep {text}", mend="write --sweep stages.0.learning_rate=1e-4,3e-4")
    if len(set(values)) < len(values):
        raise RecipeError("a value stands there twice", where=f"--sweep {text}", mend="name each value once")
    return key, values


def _as_swept(where: str | None, keys: Collection[str]) -> str | None:
    """The place of an error, as the words that the user wrote: a swept value is set for each run."""
    return next((where.replace("--set", "--sweep", 1) for key in keys if where in (f"--set {key}", f"--set {key}:1")), where)


def _split(text: str) -> list[str]:
    """At the commas that stand outside brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += character
    return parts


def _slug(combination: Sequence[tuple[str, str]]) -> str:
    """A folder's name: `learning_rate=1e-4,seed=0`."""
    short = [f"{key.removeprefix('stages.')}={value}" for key, value in combination]
    return re.sub(r"[^A-Za-z0-9=,._-]+", "_", ",".join(short))[:120].lstrip(".")


def _share_tokens(done: Path, coming: Path) -> None:
    """Gives a run the rendered rows of another, by links; a run checks what they were made from, and renders anew what does not fit."""
    with RunDirectory.open(coming, resume=True) as run:
        for store in done.glob("data/**/tokens/*"):
            target = run.file(str(store.relative_to(done)))
            if not target.exists():
                shutil.copytree(store, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _account(name: str, settings: dict[str, str], result: Any) -> dict[str, Any]:
    """What a finished run is compared by."""
    evaluation = result.evaluation or {}
    tuned = evaluation.get("tasks", {}).get("task", {}).get("candidates", {}).get("tuned", {}).get("metrics", {})
    events = read_events(result.path)
    last = load_recipe(result.path / "recipe.yaml").stages[-1]
    losses = [event["eval_loss"] for event in events if event.get("event") == "evaluated" and event["stage"] == last.name]
    kept = min(losses, default=None) if last.load_best_model_at_end else next(reversed(losses), None)
    return {
        "name": name,
        "settings": settings,
        "verdict": result.verdict,
        "validation_loss": kept,
        "metrics": tuned,
        "seconds": result.plan["measured"]["seconds"],
        "peak_memory_bytes": result.plan["measured"]["peak_memory_bytes"],
    }


def _other_measures(keys: Sequence[str], recipe: Recipe) -> list[str]:
    """The swept keys with whose values the last stage's loss is another measure.

    What comes before a stage that is held against a reference, or scored by a reward model, decides what it is held against: of two DPO
    stages, the one on the worse start may have the lower loss.
    """
    last = len(recipe.stages) - 1
    absolute = recipe.stages[last].objective.type in ABSOLUTE

    def changes(key: str) -> bool:
        if CHANGES_THE_LOSS.search(key):
            return True
        section, number, setting = (*key.split(".", 2), "", "")[:3]
        if section != "stages":
            return False
        if not setting:  # a stage, or all of them, in place of another
            return True
        return not absolute and (number != str(last) or setting == "start_from")

    return [key for key in _without_seed(dict.fromkeys(keys)) if changes(key)]


def _summary(
    grid: Sequence[tuple[str, list[str]]],
    done: Sequence[dict[str, Any]],
    failed: Sequence[dict[str, Any]],
    other: Sequence[str] = (),
) -> dict[str, Any]:
    """sweep.json: the axes, the runs, those that failed, the settings by their mean over the seeds, and the best of them.

    other: keys with whose values the loss is another measure.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in done:
        groups.setdefault(json.dumps(_without_seed(one["settings"])), []).append(one)
    settings = [_group(json.loads(key), runs) for key, runs in groups.items()]
    axes = {key: values for key, values in grid}
    planned = math.prod(map(len, axes.values()))
    lost = f"; {len(failed)} of {planned} runs failed" if failed else ""
    best, why = None, f"{len(done)} of {planned} runs are done"
    if len(done) + len(failed) == planned:
        swept = math.prod(map(len, _without_seed(axes).values()))
        best, why = _best(settings, planned // swept, of=swept, other=other)
    return {"axes": axes, "runs": list(done), "failed": list(failed), "settings": settings, "best": best, "why": why + lost}


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key.rpartition(".")[2] != "seed"}


def _group(settings: dict[str, str], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One setting's runs: how many, and mean and standard deviation over the seeds of the loss and of each metric."""
    names = sorted({name for run in runs for name in run["metrics"]})
    measured = {name: [run["metrics"][name]["value"] for run in runs if name in run["metrics"]] for name in names}
    losses = [run["validation_loss"] for run in runs]
    return {
        "settings": settings,
        "n": len(runs),
        "validation_loss": None if None in losses else _mean_and_spread(losses),
        "metrics": {name: _mean_and_spread(values) for name, values in measured.items() if len(values) == len(runs)},
    }


def _mean_and_spread(values: Sequence[float]) -> dict[str, float | None]:
    """The mean, and the standard deviation where there are several values (n - 1 in the denominator)."""
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else None
    return {"mean": mean, "sd": spread}


def _best(settings: Sequence[dict[str, Any]], seeds: int, *, of: int, other: Sequence[str]) -> tuple[dict[str, str] | None, str]:
    """The settings with the lowest mean validation loss, of those whose runs with all seeds are done, and why they were chosen or none was.

    seeds: runs of each; of: how many settings were swept.
    """
    if of < 2:
        return None, "only the seed differs: there is nothing to choose"
    settings = [one for one in settings if one["n"] == seeds]
    if len(settings) < 2:
        return None, f"all runs are done of {len(settings)} of {of} settings: there is nothing to choose"
    if other:
        return None, f"NOT MEASURED: with another {other[0]} the validation loss is another measure, and cannot be compared"
    if any(one["validation_loss"] is None for one in settings):
        return None, "NOT MEASURED: a run has no validation loss (data.validation is 0), and nothing is chosen on test rows"
    chosen, *others = sorted(settings, key=lambda one: one["validation_loss"]["mean"])
    if chosen["validation_loss"]["mean"] == others[0]["validation_loss"]["mean"]:
        return None, "several settings have the lowest validation loss, which does not tell them apart"
    return chosen["settings"], "the lowest validation loss, its mean over the seeds; the test rows took no part in it"
