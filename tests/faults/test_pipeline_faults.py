"""The fault plan for a whole run and its export: killed anywhere, what is resumed or made anew ends byte-equal."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from tests.faults.harness import CountingStorage, Ended, KillingStorage, copy_of, in_child, installed, tree
from tests.pipeline.helpers import announced, conversations, read_json, recipe, write_rows
from tests.pipeline.test_resume import results
from tests.toys import model_folder

import tunesmith
from tunesmith.errors import CheckpointError
from tunesmith.rundir import verify_folder

PARTS = ("data", "sft", "evaluate")
FAULT = "kill -9 in data preparation, in evaluation, in export, and where a result is written"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[dict[str, Any], Path, dict[str, list[int]], list[str]]:
    """A recipe with a row that is quarantined; its run; by part, the calls that change the disk in it; the units of its evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    made = recipe(folder, model_folder(folder / "model"))
    write_rows(folder / "train.jsonl", [*conversations(20), "no row"])

    def counted() -> list[Any]:
        ends, units = {}, []

        def report(event: dict[str, Any]) -> None:
            units.extend(announced([event]))
            if event.get("event") == "phase":
                ends[event["name"]] = len(counting.calls)
            if event.get("step") == 3 and "loss" in event:
                ends["trained"] = len(counting.calls)

        with installed(CountingStorage()) as counting:
            tunesmith.run(made, out=folder / "run", report=report)
        return [ends, units]

    ended = in_child(counted)
    assert ended.status == 0, ended
    ends, units = ended.result
    within = {
        "data": (ends["load"], ends["data"]),
        "sft": (ends["trained"], ends["train sft"]),
        "evaluate": (ends["train sft"], ends["evaluate"]),
    }
    return made, folder / "run", {part: list(range(a + 1, b + 1)) for part, (a, b) in within.items()}, units


@pytest.mark.parametrize("part", PARTS)
def test_a_run_killed_at_any_call_of_a_part_ends_byte_equal_and_scores_nothing_twice(unbroken, fault, part, tmp_path):
    made, whole, calls, units = unbroken
    assert read_json(whole / "data" / "ledger.json")["rows_dropped"] == {"quarantined": 1}
    runs = fault(FAULT)
    for draw in runs.drawn(short=1, whole=10):
        path, call = tmp_path / str(runs.made), draw.choice(calls[part])

        def until_killed(path: Path = path, call: int = call) -> None:
            with installed(KillingStorage(call)):
                tunesmith.run(made, out=path)

        assert in_child(until_killed).signal == signal.SIGKILL
        for manifest in path.rglob("manifest.json"):
            if manifest.parent != path and not any(name.startswith(".") for name in manifest.relative_to(path).parts):
                try:
                    verify_folder(manifest.parent)
                except CheckpointError as error:
                    raise AssertionError(f"half of a folder is visible: {error}") from error
        kept = len(list((path / "evaluation").glob("[!.]*.json")))

        def goes_on(path: Path = path) -> list[str]:
            events: list[dict[str, Any]] = []
            tunesmith.run(made, out=path, resume=True, report=events.append)
            return announced(events)

        ended = in_child(goes_on)
        assert ended.status == 0, ended
        assert ended.result == units[kept:], "what was scored is scored again"
        assert results(path) == results(whole)


@pytest.mark.parametrize("to", ["merged", "adapter"])
@pytest.mark.parametrize("before", [False, True], ids=["the first", "in place of an older one"])
def test_of_an_export_killed_at_any_call_nothing_half_is_visible_and_the_next_is_whole(unbroken, fault, to, before, tmp_path):
    whole = copy_of(unbroken[1], tmp_path / "whole")

    def exported(path: Path, double: CountingStorage) -> Ended:
        def run() -> int:
            with installed(double):
                tunesmith.export(path, to, force=True)
            return len(double.calls)

        return in_child(run)

    ended = exported(whole, CountingStorage())
    assert ended.status == 0, ended
    made = tree(whole / "export")
    older = {name: b"older" if name.endswith("README.md") else content for name, content in made.items()}
    runs = fault(FAULT)
    for draw in runs.drawn(short=1, whole=3):
        path = copy_of(unbroken[1], tmp_path / str(runs.made))
        if before:
            copy_of(whole / "export", path / "export")
            (path / "export" / to / "README.md").write_bytes(b"older")
        assert exported(path, KillingStorage(draw.randint(1, ended.result))).signal == signal.SIGKILL
        visible = {name: content for name, content in tree(path / "export").items() if not name.startswith(".")}
        assert visible in ([made, older] if before else [made, {}]), sorted(visible)
        assert exported(path, CountingStorage()).status == 0
        assert tree(path / "export") == made, "something is left of the killed one, or the next is not whole"
