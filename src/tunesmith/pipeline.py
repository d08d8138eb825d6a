"""What a verb does, in order: each part is called with its own section of the recipe, and what it gives goes into the run directory.

run = train (data, plan, stages) -> evaluate -> report
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .data.preference import prompt_of
from .data.prepare import PreparedData
from .errors import GateFailed, ModelError
from .evaluation import evaluate_run
from .forewarning import quarantine_notes, verdict_warnings
from .launch import require_processes
from .models.load import EMBEDDED
from .planning import compare_plan, cost_of, make_plan
from .preparation import fresh_base, prepare, require_files, run_path
from .recipe import Recipe, Stage, TrackingSection, dump_recipe, load_recipe
from .report import write_report
from .report.card import write_card
from .rundir import RunDirectory, rank, storage, storage_failures, sync, write_json
from .score.gold import Gold, gold_function, lost_words, means_of_checks
from .session import Report, Session
from .train.devices import first_goes_ahead, of_first, process_group
from .train.memory import peak_memory_bytes, return_freed_memory
from .train.signals import StopRequest
from .train.stage import StageInputs, is_finished, locate_start, run_stage
from .train.trackers import Trackers, require_trackers
from .train.work import learns_from_answers

HUB_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests")  # whose errors say that a model could not be fetched
UNTRAINED = {"zero_shot", "few_shot", "classical", "shorter"}  # candidates that need no result of a stage
Watched = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""A gold measure in training: prompts and answers to a number for each."""
NOTHING_TO_DO = "nothing_to_do"  # the event of a part that found everything finished


@dataclass
class RunResult:
    """What a run directory holds, as far as the verb filled it."""

    path: Path
    verdict: str | None = None
    evaluation: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None
    stage_ledgers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The ledger of each stage that has data of its own."""
    report: Path | None = None
    warnings: list[str] = field(default_factory=list)
    """Why the verdict can never be PASS or FAIL, known before anything is trained; empty where nothing stands in its way."""


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    gate: bool = False,
    report: Report = lambda event: None,
) -> RunResult:
    """Everything the recipe asks for: data, plan, training, evaluation, verdict, report.

    recipe: a file, a dict or a Recipe; sets: `key=value` overrides; out: the run directory; resume: go on where it stopped; gate: raise
    GateFailed unless the verdict is PASS; report: gets every event. Raises a TunesmithError, whose exit_status the command line returns.

    >>> tunesmith.run("recipes/quickstart.yaml").verdict  # doctest: +SKIP
    'PASS'
    """
    with _session(recipe, sets, out, resume, report) as session:
        _train(session)
        if rank() > 0:
            return RunResult(session.run.path)
        with session.phase("evaluate"):
            evaluation = evaluate_run(session)
        result = _finish(session, evaluation)
    if gate:
        require_pass(result)
    return result


def require_pass(result: RunResult) -> None:
    """Raises GateFailed unless the verdict is PASS."""
    if result.verdict != "PASS":
        raise GateFailed(f"the verdict is {result.verdict}", where=str(result.report), mend="see the gates in the report")


def train(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    report: Report = lambda event: None,
) -> RunResult:
    """Data, plan and training, without the evaluation. Arguments and errors as for `run`."""
    with _session(recipe, sets, out, resume, report) as session:
        _train(session, evaluates=False)
        return _finish(session, None) if rank() == 0 else RunResult(session.run.path)


def evaluate(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    gate: bool = False,
    report: Report = lambda event: None,
) -> RunResult:
    """Evaluates what `train` left in the run directory. Arguments and errors as for `run`.

    Raises ModelError, and makes no folder, where a candidate needs training and nothing was trained.
    """
    given = load_recipe(recipe, sets, out=out)
    if set(given.evaluate.candidates) - UNTRAINED and not (run_path(given) / "model").exists():
        raise ModelError(
            "the folder holds no trained run",
            where=str(run_path(given)),
            mend="train it first: tunesmith train RECIPE, with the same --out",
        )
    with _session(recipe, sets, out, True, report) as session:
        if rank() > 0:  # the first process evaluates alone
            return RunResult(session.run.path)
        prepare(session)
        with session.phase("evaluate"):
            evaluation = evaluate_run(session)
        result = _finish(session, evaluation)
    if gate:
        require_pass(result)
    return result


def plan(
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    report: Report = lambda event: None,
) -> dict[str, Any]:
    """What would happen: the predicted memory and time, the ledger, and the first row with its mask; nothing is left on disk.

    Returns {"plan", "ledger", "findings", "notes", "warnings", "recipe", "example"}: the warnings say why the run cannot end in PASS or
    FAIL, the example is a rich Text.
    """
    import tempfile

    from .data.render import Rendered, colourise

    with tempfile.TemporaryDirectory() as folder, _session(recipe, sets, Path(folder) / "plan", False, report) as session:
        prepare(session)
        given = load_recipe(recipe, sets, out=out)
        shown = session.recipe.model_copy(update={"output": given.output})
        ids, weights = session.data.train[0]
        predicted = make_plan(session)
        return {
            "plan": predicted,
            "ledger": session.data.ledger.to_json(),
            "findings": [finding.to_json() for finding in session.data.findings],
            "notes": [*session.data.notes, *quarantine_notes(session, run_path(given))],
            "warnings": verdict_warnings(session.recipe, session.tasks),
            "recipe": dump_recipe(shown),
            "example": colourise(Rendered(ids, weights, 0), session.loaded.tokenizer),
        }


@contextmanager
def _session(
    source: str | Path | dict[str, Any] | Recipe, sets: Sequence[str], out: str | Path | None, resume: bool, report: Report
) -> Iterator[Session]:
    recipe = load_recipe(source, sets, out=out)
    require_files(recipe)
    require_trackers(recipe.tracking)
    with StopRequest() as stop, process_group(), _directory(run_path(recipe), resume) as directory, _hub_explained(recipe.model.name):
        yield Session(recipe, directory, stop, report if rank() == 0 else lambda event: None)


def _directory(path: Path, resume: bool) -> RunDirectory:
    """The run directory: the first process opens it and writes, the others follow."""
    opened = RunDirectory.open(path, resume=resume) if rank() == 0 else None
    resumed = of_first(lambda: opened.resumed)
    return opened or RunDirectory.follow(path, resumed=resumed)


@contextmanager
def _hub_explained(name: str) -> Iterator[None]:
    """What the hub's client says about a model that cannot be fetched, with what to do in its place."""
    try:
        yield
    except ModelError as error:
        if error.where != name or type(error.__cause__).__module__.partition(".")[0] not in HUB_CLIENTS:
            raise
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it" if offline else f"the hub does not give it: {error.what}"
        first = "unset HF_HUB_OFFLINE once" if offline else "check the name and the network (a private or gated one needs HF_TOKEN)"
        mend = f"{first}; or name a folder written by save_pretrained, a .gguf file, or an embedded model: {', '.join(EMBEDDED)}"
        raise ModelError(f"no such model here: {why}", where=f"model.name: {name}", mend=mend) from error


def _train(session: Session, *, evaluates: bool = True) -> None:
    """Prepares, plans, and trains every stage that is not finished yet. evaluates: whether the plan is to count an evaluation after it."""
    require_processes(session.recipe.launch)
    with first_goes_ahead():
        prepare(session)
    if rank() == 0:
        _plan(session, evaluates=evaluates)
    recipe, steps = session.recipe, {stage.name: stage.max_steps for stage in session.stages}
    told = recipe.tracking if rank() == 0 else TrackingSection()
    with Trackers(told, recipe.name, session.run.path, recipe.model_dump(), steps) as trackers:

        def report(event: dict[str, Any]) -> None:
            session.report(event)
            trackers.log(event)

        for stage in session.stages:
            if not of_first(partial(is_finished, session.run, stage)):
                _train_stage(session, stage, report)
    if rank() == 0:
        _publish_model(session)


def _plan(session: Session, *, evaluates: bool) -> None:
    """Writes and shows what is to be expected."""
    predicted = make_plan(session, evaluates=evaluates)
    write_json(session.run.file("plan.json"), {"predicted": predicted, "measured": None, "compared": compare_plan(predicted, {})})
    notes = [*session.data.notes, *(note for data in session.stage_data.values() for note in data.notes), *predicted["notes"]]
    notes += quarantine_notes(session, session.run.path)
    warnings = verdict_warnings(session.recipe, session.tasks)
    session.run.log({"event": "notes", "notes": notes})
    session.report({"event": "plan", **predicted, "ledger": session.data.ledger.to_json(), "notes": notes, "warnings": warnings})


def _train_stage(session: Session, stage: Stage, report: Report) -> None:
    data = session.data_of(stage)
    session.worked = True
    with session.phase(f"train {stage.name}"), _watched(session, stage) as gold:
        inputs = StageInputs(
            loaded=session.loaded,
            section=session.recipe.model,
            data=data,
            template=session.template,
            new_tokens=session.new_tokens,
            system=common_system(data),
            start=locate_start(stage, session.run.path),
            seed=session.recipe.seed if stage.seed is None else stage.seed,
            gold=gold,
            processes=session.recipe.launch.processes,
            strategy=session.recipe.launch.strategy,
        )
        run_stage(stage, inputs, session.run, stop=session.stop, report=report)
        del inputs
    # What comes next starts from what the disk holds, so that a resumed run does exactly the same; the stage's weights go first.
    session.loaded = None
    return_freed_memory()
    session.loaded = fresh_base(session)


@contextmanager
def _watched(session: Session, stage: Stage) -> Iterator[Watched | None]:
    """The recipe's gold measure, while a stage samples answers; its process ends after."""
    setting = session.recipe.task.gold_reward
    if setting is None or rank() > 0 or not learns_from_answers(stage):
        yield None
        return
    with closing(gold_function(setting)) as gold:
        yield _telling(session, stage, gold)


def _telling(session: Session, stage: Stage, gold: Gold) -> Watched:
    """A gold measure whose first failure in a stage is logged and shown; later ones are as many, and say nothing new."""
    told = False

    def measure(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        nonlocal told
        found = gold.checks(prompts, answers)
        lost = lost_words(gold.name, found)
        if lost is not None and not told:
            told = True
            session.tell({"event": "note", "stage": stage.name, "note": f"the gold measure of stage {stage.name}: {lost}"})
        return means_of_checks(found)

    return measure


def common_system(data: PreparedData) -> str | None:
    """The system message that every training row has in common, if there is one."""
    prompts = [prompt_of(row) for row in data.records]
    first = {prompt[0].content if prompt and prompt[0].role == "system" else None for prompt in prompts}
    return first.pop() if len(first) == 1 else None


def _publish_model(session: Session) -> None:
    """model/ is the last stage's result: a link beside it, so that nothing is held twice."""
    link, target = session.run.path / "model", Path("stages") / session.stages[-1].name / "model"
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = session.run.path / ".model"
    with storage_failures(link):
        if temporary.is_symlink():
            storage.unlink(temporary)
        temporary.symlink_to(target, target_is_directory=True)
        storage.rename(temporary, link)
        sync(link.parent)


def _finish(session: Session, evaluation: dict[str, Any] | None) -> RunResult:
    path = session.run.path
    if not session.worked:
        session.run.log({"event": NOTHING_TO_DO})
    measured = _measured(session)
    plan_path = path / "plan.json"
    predicted = json.loads(plan_path.read_text())["predicted"] if plan_path.is_file() else None
    foreseen = measured if predicted is None or _foresees_evaluation(predicted) else _measured(session, evaluations=False)
    plan = {"predicted": predicted, "measured": measured, "compared": compare_plan(predicted, foreseen)}
    write_json(plan_path, plan)
    page = write_report(path)
    if (path / "model").exists():
        write_card(path, session.loaded.identity)
    return RunResult(
        path,
        evaluation["verdict"] if evaluation else None,
        evaluation,
        plan,
        session.data.ledger.to_json(),
        {name: data.ledger.to_json() for name, data in session.stage_data.items()},
        page,
        verdict_warnings(session.recipe, session.tasks),
    )


def _foresees_evaluation(predicted: dict[str, Any]) -> bool:
    """Whether it is the plan of `run`; that of `train` ends with the training, and can be held against no more."""
    return any(phase["name"].startswith("evaluate ") for phase in predicted["phases"])


def _measured(session: Session, *, evaluations: bool = True) -> dict[str, Any]:
    """What the run really took, over all its parts; a phase that was resumed counts each time, a part that found all finished never.

    evaluations: whether what the evaluation took counts.
    """
    events = session.run.events()
    phases = _phases(events, evaluations=evaluations)
    stages = {event["stage"]: event for event in events if event.get("event") == "stage_finished"}
    spent: Counter[str] = Counter()
    for event in phases:
        if event["name"] in ("load", "data"):
            spent[event["name"]] += event["seconds"]
    for name, event in stages.items():
        spent.update({f"{phase} {name}": seconds for phase, seconds in event.get("phases", {}).items()})
    parts = {event["name"]: event["seconds"] for event in events if event.get("event") == "phase_part" and evaluations}
    for name, seconds in parts.items():
        task, candidate = name.split(".", 1)
        spent["evaluate " + {"few_shot": "few_shot", "general": "general"}.get(task, candidate)] += seconds
    whole = sum(event["seconds"] for event in phases)
    return {
        "peak_memory_bytes": max((event["peak_memory_bytes"] for event in phases), default=peak_memory_bytes()),
        "seconds": whole,
        "tokens": sum(event["tokens"] for event in stages.values()),
        "cost": cost_of(session.recipe, whole),
        "bound_by": None,
        "phases": [{"name": name, "seconds": seconds} for name, seconds in spent.items()],
    }


def _phases(events: Sequence[dict[str, Any]], *, evaluations: bool) -> list[dict[str, Any]]:
    """The phases of the parts that did something; each part of a run begins with `load`.

    evaluations: whether to count evaluating, and what a part that did only that read for it.
    """
    parts: list[list[dict[str, Any]]] = [[]]
    for event in events:
        if event.get("event") == "phase":
            if event["name"] == "load":
                parts.append([])
            parts[-1].append(event)
        elif event.get("event") == NOTHING_TO_DO:
            parts[-1].clear()
    counted = parts if evaluations else [part for part in parts if not _only_evaluates(part)]
    return [event for part in counted for event in part if evaluations or event["name"] != "evaluate"]


def _only_evaluates(part: Sequence[dict[str, Any]]) -> bool:
    kinds = {event["name"].partition(" ")[0] for event in part}
    return "evaluate" in kinds and "train" not in kinds
