"""Evaluating a session's run: the frozen tasks, the generators of base and tuned model, and what is written of it."""

from __future__ import annotations

import gc
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .data.records import Conversation
from .data.render import stop_tokens
from .evaluate import EvaluationInputs, StageResult, TemplateEncoder, evaluate_candidates
from .evaluate.inputs import BASE, Compares, RowScores
from .generate import Constraint, LocalGenerator, choice_constraint, json_schema_constraint
from .models.heads import load_head
from .models.load import LoadedModel, hash_weights, load_model
from .models.opening import open_result
from .models.result import read_card, require_unaltered
from .models.reward import Scored, Separate
from .recipe import Stage
from .rundir import MANIFEST, write_json, write_text
from .score.metrics import PREFERENCE
from .session import Session
from .train.stage import add_new_tokens, locate_start

UNITS = "evaluation"  # the folder of finished units, so that a resumed run scores nothing twice


@dataclass
class _Models:
    """The session's models, one at a time. An adapter is put into the base's own layers, so that each result needs a base of its own."""

    session: Session
    stop_ids: list[int]
    altered: bool = False
    """Whether the base at hand carries an adapter."""

    def generator(self, model: nn.Module) -> LocalGenerator:
        """On a model at hand."""
        size = self.session.recipe.evaluate.batch_size
        return LocalGenerator(model, self.session.loaded.tokenizer, batch_size=size, stop_ids=self.stop_ids)

    def base(self) -> LocalGenerator:
        """On the base as it is without any result."""
        self._untouched()
        return self.generator(self.session.loaded.model)

    def result(self, folder: Path) -> nn.Module:
        """A result, as it was saved."""
        self._untouched()
        self.altered = True
        return open_result(folder, self.session.loaded, trust_remote_code=self.session.recipe.model.trust_remote_code)

    def scores(self, folder: Path) -> RowScores:
        """A reward model's score head on rows of token ids."""
        model, loaded = self.result(folder), self.session.loaded
        judge = Separate.of(model, load_head(folder, "score", loaded.width).to(loaded.device))
        return lambda rows: judge.scores([Scored((), "", np.array(row, dtype=np.int64)) for row in rows])

    def _untouched(self) -> None:
        if not self.altered:
            return
        self.session.loaded = None  # its memory goes before the next is read
        gc.collect()
        self.session.loaded = load_model(self.session.recipe.model)
        add_new_tokens(self.session.loaded, self.session.template)
        self.altered = False


def evaluate_run(session: Session) -> dict[str, Any]:
    """Runs every candidate and writes evaluation.json and samples/. Returns evaluation.json's content.

    Results are read from the run directory, also right after training: what is measured is what was saved.
    """

    def save(unit: str, payload: dict[str, Any]) -> None:
        session.worked = True
        write_json(session.run.file(f"{UNITS}/{unit}.json"), payload)

    def announce(what: str) -> None:
        session.stop.defer(False)  # raises where a signal came in and a library swallowed what it raised
        session.report({"event": "evaluating", "what": what})

    folder = session.run.file(UNITS)
    folder.mkdir(exist_ok=True)
    done = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = evaluate_candidates(session.recipe.evaluate, _inputs(session), done=done, save=save, announce=announce)
    for name, seconds in found.seconds.items():
        session.tell({"event": "phase_part", "of": "evaluate", "name": name, "seconds": seconds})
    for name, lines in found.samples.items():
        write_text(session.run.file(f"samples/{name}.jsonl"), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    found.evaluation["notes"] += [*session.tasks.notes]
    write_json(session.run.file("evaluation.json"), found.evaluation)
    return found.evaluation


def _inputs(session: Session) -> EvaluationInputs:
    recipe, data, tasks = session.recipe, session.data, session.tasks
    result = session.run.path / "model"
    trained = result.exists()
    stops = stop_tokens(session.template, session.loaded.tokenizer) if session.template else []
    models = _Models(session, stops)
    return EvaluationInputs(
        task=tasks.task,
        training=[r for r in data.records if isinstance(r, Conversation)],
        encoder=TemplateEncoder(session.template, session.loaded.tokenizer),
        base=models.base,
        tuned=(lambda: models.generator(models.result(result))) if trained else None,
        base_id=session.loaded.identity.sha256,
        tuned_id=_result_hash(result) if trained else "",
        max_new_tokens=recipe.evaluate.max_new_tokens,
        vocabulary_size=session.loaded.model.get_input_embeddings().weight.shape[0],
        general=tasks.general,
        validation=tasks.validation,
        constraint=_constraint(tasks.schema, tasks.labels, session.loaded, stops),
        context_length=session.context,
        training_template_sha256=read_card(result).get("template_sha256"),
        dtype=str(session.loaded.dtype).removeprefix("torch."),
        stop_ids=tuple(stops),
        version=_package_version(),
        seed=recipe.seed,
        results=_results(session, models),
        last_stage=session.stages[-1].name,
        reward_models=tuple(stage.name for stage in session.stages if stage.objective.type == "reward"),
        gold=tasks.gold,
    )


def _results(session: Session, models: _Models) -> dict[str, StageResult]:
    """The results of stages that the evaluation may need, in order, and of what they start from outside the run (`STAGE.start`)."""
    stages = {stage.name: stage for stage in session.stages}
    wanted = _needed(session, stages)
    found: dict[str, StageResult] = {}
    for name, stage in stages.items():
        folder = session.run.path / "stages" / name / "model"
        if name not in wanted or not folder.exists():
            continue
        start = BASE
        if stage.start_from is not None and PREFERENCE in session.recipe.task.metrics:
            start = stage.start_from if stage.start_from in stages else f"{name}.start"
            if start not in stages:
                found[start] = _stage_result(locate_start(stage, session.run.path), models)
        scores = partial(models.scores, folder) if stage.objective.type == "reward" else None
        found[name] = _stage_result(folder, models, compares=compares(stage), start=start, scores=scores)
    return found


def _stage_result(folder: Path, models: _Models, **how: Any) -> StageResult:
    return StageResult(lambda: models.generator(models.result(folder)), _result_hash(folder), **how)


def _needed(session: Session, stages: dict[str, Stage]) -> set[str]:
    """The stages whose results are candidates, reward models, or what one of the two is compared with."""
    section, metrics = session.recipe.evaluate, session.recipe.task.metrics
    named = {*section.candidates}
    for gate in section.gates:
        named |= {gate.candidate, gate.better_than, gate.not_worse_than} - {None}
    wanted = {session.stages[-1].name, *(name for name in stages if name in named)}
    if "reward" in metrics:
        wanted |= {name for name, stage in stages.items() if stage.objective.type == "reward"}
    if PREFERENCE in metrics:
        wanted |= {stages[name].start_from for name in tuple(wanted)} & stages.keys()
    return wanted


def compares(stage: Stage) -> Compares:
    """How a stage's result says which of two answers is better: by what its objective compares answers by, where it does."""
    objective = stage.objective
    if objective.type == "reward":
        return "score"
    if objective.type in ("sft", "best_of_n", "simpo", "orpo"):
        return "mean_logprob"
    if objective.type == "cpo":
        return "logprob"
    mean = getattr(objective, "length_normalised", False) or getattr(objective, "loss", "") == "ipo"
    if getattr(objective, "reference", "start") == "none":
        return "mean_logprob" if mean else "logprob"
    return "mean_log_ratio" if mean else "log_ratio"


def _constraint(schema: dict[str, Any] | None, labels: Sequence[str] | None, loaded: LoadedModel, stops: list[int]) -> Constraint | None:
    if schema is not None:
        return json_schema_constraint(schema, loaded.tokenizer, stop_ids=stops)
    return choice_constraint(labels, loaded.tokenizer, stop_ids=stops) if labels else None


def _package_version() -> str:
    try:
        return importlib.metadata.version("tunesmith")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def _result_hash(folder: Path) -> str:
    """What a result's scores depend on: its weights, as they lie there now. Raises CheckpointError where they are others."""
    require_unaltered(folder)
    if not (folder / MANIFEST).is_file():  # another tool wrote it
        return hash_weights(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    return json.dumps(sorted((name, entry["sha256"]) for name, entry in manifest["files"].items() if name.endswith(".safetensors")))
