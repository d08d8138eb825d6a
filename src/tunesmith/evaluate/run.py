"""The evaluation, in its order: choices on the validation items, then every candidate on the frozen test items once, then the verdict.

Takes the recipe's evaluate section and what it needs as objects and callables; gives evaluation.json's content, the samples and the
seconds. Each unit of work (one example set, one candidate's answers, one candidate's perplexity) is handed to `save` when done and taken
from `done` on the next call if nothing it depends on has changed: after a crash nothing is scored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import TemplateError
from ..recipe.evaluate import EvaluateSection
from ._judging import Comparison, ask_gold, ask_reward_models, models_in_order
from ._work import Work
from .inputs import BASE, EvaluationInputs
from .scoring import chance_values
from .task import Task, task_summary
from .verdict import Bootstrap, comparisons, decide_gates, recommend, verdict

GUARDED = ("zero_shot", "tuned")
"""The candidates measured on the general set: the base and the tuned model, each with its bare prompt."""


@dataclass(frozen=True)
class EvaluationResult:
    """evaluation: evaluation.json's content. samples: "TASK.CANDIDATE" to its lines. seconds: the same keys, few_shot.selection and
    alone.tuned.

    The seconds are apart so that the evaluation of a resumed run is byte-equal to an unbroken one's.
    """

    evaluation: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    seconds: dict[str, float]


def evaluate_candidates(
    section: EvaluateSection,
    inputs: EvaluationInputs,
    *,
    done: Mapping[str, dict[str, Any]] | None = None,
    save: Callable[[str, dict[str, Any]], None] = lambda unit, payload: None,
    announce: Callable[[str], None] = lambda what: None,
) -> EvaluationResult:
    """Runs what is not in `done` and decides.

    done, save: unit name to its JSON payload, kept by the caller. announce: told in words what starts. Raises TemplateError where the tuned
    model was trained with another chat template, DataRefused where an item does not fit the model's context.
    """
    trained_with = inputs.training_template_sha256
    if trained_with not in (None, inputs.encoder.sha256):
        raise TemplateError(
            f"the evaluation's chat template ({inputs.encoder.sha256[:12]}) is not the one of the training ({trained_with[:12]})",
            where="model.chat_template",
            mend="evaluate with the template that lies in the trained model's folder",
        )
    work = Work(section, inputs, dict(done or {}), save, announce)
    task = inputs.task if inputs.task and inputs.task.items else None
    if task:
        work.run_task(task)
    if inputs.general and inputs.general.items:
        work.run_general(inputs.general)
    comparison = Comparison(work, task)
    comparison.ask(BASE)
    for model in models_in_order(work, comparison):
        for candidate in work.wanted:
            if inputs.model_of(candidate) == model:
                work.run_result(candidate)
        comparison.ask(model)
    comparison.conclude()
    if task:
        ask_reward_models(work, task)
        ask_gold(work, task)
    return _conclude(section, inputs, work)


def _conclude(section: EvaluateSection, inputs: EvaluationInputs, work: Work) -> EvaluationResult:
    """Intervals, comparisons, gates and verdict from what was measured."""
    bootstrap = Bootstrap(section.bootstrap_resamples, section.confidence, inputs.seed)
    tasks = [task for task in (inputs.task, inputs.general) if task is not None]
    chance = {task.name: {} if task is inputs.general else chance_values(task) for task in tasks}
    for task in tasks:
        if task.items and task.has_references:
            chance[task.name]["perplexity"] = {"value": float(inputs.vocabulary_size), "n": len(task.items)}
    decided = decide_gates(section.gates, work.results, bootstrap, chance)
    evaluation = {
        "tasks": {task.name: _task_json(task, work, bootstrap, chance[task.name]) for task in tasks},
        "comparisons": comparisons(work.results, section.gates, bootstrap, same=inputs.last_stage),
        "gates": decided,
        "recommendation": _recommendation(
            section, inputs, work, recommend(work.results, section.gates, decided, bootstrap, stages=_stages(inputs))
        ),
        "verdict": verdict(decided),
        "few_shot": work.few_shot,
        "classical": work.classical,
        "confidence": section.confidence,
        "bootstrap_resamples": section.bootstrap_resamples,
        "seed": inputs.seed,
        "notes": list(dict.fromkeys(work.notes)),
    }
    return EvaluationResult(evaluation, work.samples(tasks), work.seconds)


def _recommendation(section: EvaluateSection, inputs: EvaluationInputs, work: Work, found: dict[str, Any]) -> dict[str, Any]:
    """The recommendation; where there is none and no candidate has the metric that the recipe asks for first, that metric, and why."""
    task = inputs.task
    if found["candidate"] is not None or task is None or not task.metrics or any(gate.task == "task" for gate in section.gates):
        return found
    metric, scored = task.metrics[0], [one for (name, _), one in work.results.items() if name == task.name]
    if any(metric in one.statistics for one in scored):
        return found
    why = next((one.not_measured[metric] for one in scored if metric in one.not_measured), None)
    return {"candidate": None, "reason": f"NOT MEASURED: no candidate has {metric} on a test set{f': {why}' if why else ''}."}


def _task_json(task: Task, work: Work, bootstrap: Bootstrap, chance: Mapping[str, Any]) -> dict[str, Any]:
    candidates = {}
    for (name, candidate), scored in work.results.items():
        if name == task.name:
            metrics = scored.metrics_json(resamples=bootstrap.resamples, confidence=bootstrap.confidence, seed=bootstrap.seed)
            entry = {"metrics": metrics, "template_sha256": scored.template_sha256, **work.entries[name, candidate]}
            candidates[candidate] = entry | ({"not_measured": scored.not_measured} if scored.not_measured else {})
    wanted = GUARDED if task is work.inputs.general else work.wanted
    reason = "there are no items" if not task.items else None
    absent = {name: reason or work.absent.get(name, "it was not asked for") for name in wanted if name not in candidates}
    prompts = {"prompt_sha256": work.prompt_hashes.get(task.name)}
    return {**task_summary(task), **prompts, "chance": dict(chance), "candidates": candidates, "not_measured": absent}


def _stages(inputs: EvaluationInputs) -> tuple[str, ...]:
    """The stages whose results are candidates of their own; the last's is the tuned model."""
    return tuple(name for name in inputs.results if name != inputs.last_stage)
