"""Reads what a report needs from a run directory; any file may be missing, and a torn or strange one never stops the report.

Takes the run's path; gives `RunFiles`, whose parts are None where a file is missing, and `problems`, one sentence for each
file that is there but could not be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# A candidate or task name becomes part of a file name only when it is one plain word: ids are not paths.
_FILE_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# No single JSON document of a run is near this; a larger one is not ours.
_MAX_JSON_BYTES = 64 * 2**20


@dataclass
class RunFiles:
    """The run directory's contents as JSON values."""

    path: Path
    recipe_text: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None
    health: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    events: list[dict[str, Any]] | None = None
    quarantine: list[dict[str, Any]] | None = None
    stage_data: dict[str, tuple[dict[str, Any], list[dict[str, Any]] | None]] = field(default_factory=dict)
    """Ledger and quarantine of each stage that has data of its own."""
    problems: list[str] = field(default_factory=list)
    _samples: dict[str, list[dict[str, Any]] | None] = field(default_factory=dict)

    def samples(self, task: str, candidate: str) -> list[dict[str, Any]] | None:
        """The sample lines of one candidate on one task; None when there is no such file."""
        if not (_FILE_WORD.fullmatch(task) and _FILE_WORD.fullmatch(candidate)):
            return None
        name = f"{task}.{candidate}.jsonl"
        if name not in self._samples:
            self._samples[name] = _json_lines(self.path / "samples" / name, self.problems)
        return self._samples[name]


def read_run(path: Path) -> RunFiles:
    """Reads every file of the run directory `path` that the report shows."""
    run = RunFiles(path)
    run.recipe_text = _text(path / "recipe.yaml", run.problems)
    run.recipe = _yaml_mapping(run.recipe_text, run.problems)
    run.manifest = _json_object(path / "manifest.json", run.problems)
    run.ledger = _json_object(path / "data" / "ledger.json", run.problems)
    run.health = _json_object(path / "data" / "health.json", run.problems)
    run.plan = _json_object(path / "plan.json", run.problems)
    run.evaluation = _json_object(path / "evaluation.json", run.problems)
    run.events = _json_lines(path / "events.jsonl", run.problems)
    run.quarantine = _json_lines(path / "data" / "quarantine.jsonl", run.problems)
    stages = run.recipe.get("stages")
    for name in [str(stage.get("name")) for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []:
        folder = path / "data" / name
        if _FILE_WORD.fullmatch(name) and (ledger := _json_object(folder / "ledger.json", run.problems)) is not None:
            run.stage_data[name] = (ledger, _json_lines(folder / "quarantine.jsonl", run.problems))
    return run


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            problems.append(f"{path.name} is larger than {_MAX_JSON_BYTES // 2**20} MiB and was not read.")
            return None
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} could not be read ({error.strerror}).")
        return None


def _yaml_mapping(source: str | None, problems: list[str]) -> dict[str, Any]:
    if source is None:
        return {}
    try:
        value = yaml.safe_load(source)
    except (yaml.YAMLError, ValueError, RecursionError):
        problems.append("recipe.yaml is not valid YAML.")
        return {}
    return value if isinstance(value, dict) else {}


def _json_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    source = _text(path, problems)
    if source is None:
        return None
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is not valid JSON.")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is not a JSON object.")
        return None
    return value


def _json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]] | None:
    """The objects of a JSON Lines file; a torn last line (a killed writer's) is expected, any other bad line is reported."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            parsed, bad = _parse_lines(lines)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} could not be read ({error.strerror}).")
        return None
    if bad:
        first, how_many = bad[0], len(bad)
        problems.append(f"{path.name}: {how_many} line{'' if how_many == 1 else 's'} could not be read, the first is line {first}.")
    return parsed


def _parse_lines(lines: Iterable[str]) -> tuple[list[dict[str, Any]], list[int]]:
    parsed, bad = [], []
    for position, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            parsed.append(value)
        elif line.endswith("\n"):
            bad.append(position)
    return parsed, bad
