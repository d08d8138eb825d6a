"""The evaluation, in its order: choices on the validation items, then every candidate on the frozen test items once, then the verdict.

Takes the recipe's evaluate section and what it needs as objects and callables; gives evaluation.json's content, the samples and the
seconds. Each unit of work (one example set, one candidate's answers, one candidate's perplexity) is handed to `save` when done and taken
from `done` on the next call if nothing it depends on has changed: after a crash nothing is scored twice.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.records import Conversation
from ..errors import TemplateError
from ..generate.protocol import Constraint, Generator
from ..recipe.evaluate import EvaluateSection
from .candidates import Asked, Example, decoding, encode_items, encode_messages, generate_answers, with_examples
from .encode import Encoder
from .few_shot import ExampleSet, Trial, choose, draw_sets, selection_json
from .perplexity import ReferenceNats, reference_nats
from .scoring import Scored, chance_values, generation_json, score_answers, score_labels, score_references
from .task import Task, task_summary
from .verdict import Bootstrap, comparisons, decide_gates, recommend, verdict

GUARDED = ("zero_shot", "tuned")
"""The candidates measured on the general set: the base and the tuned model, each with its bare prompt."""

CHECKED_ALONE = 16
"""Prompts whose bf16 answers are made again one by one; fewer items are not worth it."""
CHECKED_TOKENS = 64
"""The longest of those answers, in tokens."""


@dataclass(frozen=True)
class EvaluationInputs:
    """What the evaluation works on.

    base, tuned: make the generator of the base and of the tuned model, called once, when it is first needed (tuned None: there is none).
    base_id, tuned_id: hashes of their weights. constraint: the compiled schema or labels, None for free text. context_length: the model's,
    in tokens. vocabulary_size: the perplexity of knowing nothing. training_template_sha256: of the template the tuned model trained with.
    dtype, stop_ids, version: how the models are held, the tokens that end an answer, and the package's version, on which outputs depend.
    """

    task: Task | None
    training: Sequence[Conversation]
    encoder: Encoder
    base: Callable[[], Generator]
    tuned: Callable[[], Generator] | None
    base_id: str
    tuned_id: str
    max_new_tokens: int
    vocabulary_size: int
    general: Task | None = None
    validation: Task | None = None
    constraint: Constraint | None = None
    context_length: int | None = None
    training_template_sha256: str | None = None
    dtype: str = "float32"
    stop_ids: tuple[int, ...] = ()
    version: str = ""
    seed: int = 0


@dataclass(frozen=True)
class EvaluationResult:
    """evaluation: evaluation.json's content. samples: "TASK.CANDIDATE" to its lines. seconds: the same keys, and few_shot.selection.

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
    work = _Work(section, inputs, dict(done or {}), save, announce)
    if inputs.task and inputs.task.items:
        work.run_task(inputs.task)
    if inputs.general and inputs.general.items:
        work.run_general(inputs.general)
    work.run_tuned()
    return _conclude(section, inputs, work)


@dataclass
class _Work:
    """The state of one evaluation: what is measured so far."""

    section: EvaluateSection
    inputs: EvaluationInputs
    done: dict[str, dict[str, Any]]
    save: Callable[[str, dict[str, Any]], None]
    announce: Callable[[str], None]
    results: dict[tuple[str, str], Scored] = field(default_factory=dict)
    entries: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prompt_hashes: dict[str, str] = field(default_factory=dict)
    few_shot: dict[str, Any] | None = None
    classical: dict[str, Any] | None = None
    _generators: dict[str, Generator] = field(default_factory=dict)

    def run_task(self, task: Task) -> None:
        """The candidates on the base model and the classical one; few_shot's choice comes before any test item is read."""
        wanted = self.section.candidates
        if task.is_text:
            self.absent.update(dict.fromkeys(("few_shot", "classical"), "plain text is measured by perplexity alone"))
            self.run_general(task)
            return
        chosen = self._choose_examples(task) if "few_shot" in wanted else None
        if "zero_shot" in wanted:
            self._language_model(task, "zero_shot", "base", ())
        if chosen is not None:
            self._language_model(task, "few_shot", "base", chosen.examples)
        if "classical" in wanted:
            self._classical(task)

    def run_general(self, general: Task) -> None:
        """The base on the guard set."""
        if "zero_shot" in self.section.candidates:
            self._guard(general, "zero_shot", "base")

    def run_tuned(self) -> None:
        """The tuned model on both; the base is let go of first."""
        if "tuned" not in self.section.candidates:
            return
        self._generators.pop("base", None)
        if self.inputs.tuned is None:
            self.absent["tuned"] = "there is no tuned model"
            return
        if self.inputs.task and self.inputs.task.items:
            if self.inputs.task.is_text:
                self._guard(self.inputs.task, "tuned", "tuned")
            else:
                self._language_model(self.inputs.task, "tuned", "tuned", ())
                self._disagreement(self.inputs.task)
        if self.inputs.general and self.inputs.general.items:
            self._guard(self.inputs.general, "tuned", "tuned")

    def _choose_examples(self, task: Task) -> ExampleSet | None:
        validation = self.inputs.validation
        sets = draw_sets(
            self.inputs.training,
            task,
            ks=self.section.few_shot_k,
            sets=self.section.few_shot_sets,
            seed=self.inputs.seed,
            fits=self._fits(validation),
        )
        sets = [one for one in sets if one.examples]
        if not sets:
            self.absent["few_shot"] = "no training row can be an example"
            return None
        trials = [self._try(one, validation) for one in sets]
        chosen = choose(trials)
        self.few_shot = selection_json(trials, chosen)
        self.notes += self.few_shot["notes"]
        return chosen.chosen_from

    def _try(self, drawn: ExampleSet, validation: Task | None) -> Trial:
        if validation is None or not validation.items:
            return Trial(drawn, "exact_match", None, 0)
        name = f"few_shot.k{drawn.k}.set{drawn.index}"
        payload = self._answers(name, validation, "few_shot", "base", self._encode(validation, drawn.examples, references=False))
        self.seconds["few_shot.selection"] = self.seconds.get("few_shot.selection", 0.0) + payload["seconds"]
        metric = validation.selection_metric
        scores = [
            validation.score(output["text"], item.reference).scores[metric]
            for output, item in zip(payload["outputs"], validation.items, strict=True)
        ]
        return Trial(drawn, metric, sum(scores) / len(scores), len(scores))

    def _fits(self, validation: Task | None) -> Callable[[Sequence[Example]], bool]:
        limit = self.inputs.context_length
        if limit is None or validation is None or not validation.items:
            return lambda examples: True
        encoder, room = self.inputs.encoder, self.inputs.max_new_tokens
        longest = max(validation.items, key=lambda item: len(encode_messages(encoder, item.messages, item)))
        return lambda examples: len(encode_messages(encoder, with_examples(longest.messages, examples), longest)) + room <= limit

    def _language_model(self, task: Task, candidate: str, model: str, examples: Sequence[Example]) -> None:
        asked = self._encode(task, examples)
        self.notes += asked.notes
        made = self._answers(f"{task.name}.{candidate}.answers", task, candidate, model, asked)
        nats, seconds = self._perplexity(f"{task.name}.{candidate}.perplexity", model, asked)
        texts = [output["text"] for output in made["outputs"]]
        scored = score_answers(task, candidate, texts, nats, template_sha256=self.inputs.encoder.sha256)
        entry = {"decoding": decoding(candidate, task), "model": self._model_id(model), "max_new_tokens": self.inputs.max_new_tokens}
        self._keep(scored, {**entry, **generation_json(made["outputs"])}, made["seconds"] + seconds)
        self._sample(task, scored, texts, [output["finish_reason"] for output in made["outputs"]])

    def _disagreement(self, task: Task) -> None:
        """Notes how many of some bf16 answers depend on what else is in the batch: its rounding is no property of the model."""
        if self.inputs.dtype != "bfloat16" or len(task.items) < CHECKED_ALONE:
            return
        from ..generate.local import batch_disagreement  # imported here: torch, which the rest of the evaluation does without

        prompts = self._encode(task, (), references=False).prompts[:CHECKED_ALONE]
        limit = min(self.inputs.max_new_tokens, CHECKED_TOKENS)

        def compare() -> dict[str, Any]:
            return {"share": batch_disagreement(self._generator("tuned"), prompts, max_new_tokens=limit)}

        what = f"tuned: {len(prompts)} answers together and alone"
        payload = self._unit(f"{task.name}.tuned.alone", [self._model_id("tuned"), limit, prompts], compare, what)
        different = round(payload["share"] * len(prompts))
        self.notes.append(f"{different} of {len(prompts)} answers differ in bf16 when generated alone (tuned, the first {limit} tokens)")

    def _guard(self, general: Task, candidate: str, model: str) -> None:
        nats, seconds = self._perplexity(f"{general.name}.{candidate}.perplexity", model, self._encode(general, (), max_new_tokens=0))
        scored = score_references(general, candidate, nats, template_sha256=self.inputs.encoder.sha256)
        self._keep(scored, {"model": self._model_id(model)}, seconds)
        self._sample(general, scored, [None] * len(general.items), [None] * len(general.items))

    def _classical(self, task: Task) -> None:
        if not task.label_fields:
            self.absent["classical"] = "the answers have no label fields"
            return
        if not self.inputs.training:
            self.absent["classical"] = "there are no training rows"
            return
        # Imported here: scikit-learn costs a second that an evaluation without this candidate need not pay.
        from .classical import answer_text, classical_answers

        def fit() -> dict[str, Any]:
            found = classical_answers(self.inputs.training, self.inputs.validation, task)
            return {"labels": list(found.labels), "trials": list(found.trials), "C": found.C}

        rows = [row.row_id for row in self.inputs.training]
        checks = self.inputs.validation.sha256 if self.inputs.validation else None
        payload = self._unit(f"{task.name}.classical", [task.sha256, checks, rows], fit, "classical: TF-IDF and logistic regression")
        self.classical = {"C": payload["C"], "trials": payload["trials"]}
        scored = score_labels(task, "classical", payload["labels"])
        self._keep(scored, {"not_measured": scored.not_measured} if scored.not_measured else {}, payload["seconds"])
        self._sample(task, scored, [answer_text(labels, task) for labels in payload["labels"]], [None] * len(task.items))

    def _answers(self, unit: str, task: Task, candidate: str, model: str, asked: Asked) -> dict[str, Any]:
        how = decoding(candidate, task)
        constraint = self.inputs.constraint if how == "constrained" else None
        limit = self.inputs.max_new_tokens

        def generate() -> dict[str, Any]:
            answers = generate_answers(self._generator(model), asked.prompts, max_new_tokens=limit, constraint=constraint)
            return {"outputs": [answer.to_json() for answer in answers]}

        key = [task.sha256, self._model_id(model), how, limit, asked.prompts]
        return self._unit(unit, key, generate, f"{candidate}: {len(asked.prompts)} answers to {task.name} ({how} decoding)")

    def _perplexity(self, unit: str, model: str, asked: Asked) -> tuple[ReferenceNats, float]:
        def measure() -> dict[str, Any]:
            found = reference_nats(self._generator(model), asked.prompts, asked.references)
            return {"nats": list(found.nats), "tokens": list(found.tokens)}

        key = [self._model_id(model), asked.prompts, asked.references]
        payload = self._unit(unit, key, measure, f"{unit}: {len(asked.prompts)} references")
        return ReferenceNats(tuple(payload["nats"]), tuple(payload["tokens"])), payload["seconds"]

    def _unit(self, unit: str, key: Any, compute: Callable[[], dict[str, Any]], words: str) -> dict[str, Any]:
        """The unit's payload, from an earlier call if its key is the same, else computed and saved."""
        made_with = [self.inputs.version, self.inputs.dtype, list(self.inputs.stop_ids)]
        fingerprint = _hash([unit, self.inputs.encoder.sha256, made_with, key])
        known = self.done.get(unit)
        if known is not None and known.get("fingerprint") == fingerprint:
            return known
        self.announce(words)
        start = time.perf_counter()
        payload = {"fingerprint": fingerprint, **compute()}
        payload["seconds"] = time.perf_counter() - start
        self.done[unit] = payload
        self.save(unit, payload)
        return payload

    def _encode(self, task: Task, examples: Sequence[Example], *, references: bool = True, max_new_tokens: int | None = None) -> Asked:
        asked = encode_items(
            task,
            self.inputs.encoder,
            examples=examples,
            max_new_tokens=self.inputs.max_new_tokens if max_new_tokens is None else max_new_tokens,
            context_length=self.inputs.context_length,
            references=references,
        )
        if not examples:
            self.prompt_hashes[task.name] = _hash(asked.prompts)
        return asked

    def _generator(self, model: str) -> Generator:
        if model not in self._generators:
            make = self.inputs.base if model == "base" else self.inputs.tuned
            self._generators[model] = make()
        return self._generators[model]

    def _model_id(self, model: str) -> str:
        return self.inputs.base_id if model == "base" else self.inputs.tuned_id

    def _keep(self, scored: Scored, entry: dict[str, Any], seconds: float) -> None:
        self.results[scored.task, scored.candidate] = scored
        self.entries[scored.task, scored.candidate] = entry
        self.seconds[f"{scored.task}.{scored.candidate}"] = seconds

    def _sample(self, task: Task, scored: Scored, outputs: Sequence[str | None], reasons: Sequence[str | None]) -> None:
        self.samples[f"{task.name}.{scored.candidate}"] = [
            {
                "item_id": item.item_id,
                "prompt": [message.as_given() for message in item.messages],
                "reference": item.reference,
                "output": output,
                "finish_reason": reason,
                "scores": scores,
            }
            for item, output, reason, scores in zip(task.items, outputs, reasons, scored.item_scores, strict=True)
        ]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _conclude(section: EvaluateSection, inputs: EvaluationInputs, work: _Work) -> EvaluationResult:
    """Intervals, comparisons, gates and verdict from what was measured."""
    bootstrap = Bootstrap(section.bootstrap_resamples, section.confidence, inputs.seed)
    tasks = [task for task in (inputs.task, inputs.general) if task is not None]
    chance = {task.name: {} if task is inputs.general else chance_values(task) for task in tasks}
    for task in tasks:
        if task.items:
            chance[task.name]["perplexity"] = {"value": float(inputs.vocabulary_size), "n": len(task.items)}
    decided = decide_gates(section.gates, work.results, bootstrap, chance)
    evaluation = {
        "tasks": {task.name: _task_json(task, work, bootstrap, chance[task.name]) for task in tasks},
        "comparisons": comparisons(work.results, section.gates, bootstrap),
        "gates": decided,
        "recommendation": recommend(work.results, section.gates, decided, bootstrap),
        "verdict": verdict(decided),
        "few_shot": work.few_shot,
        "classical": work.classical,
        "confidence": section.confidence,
        "bootstrap_resamples": section.bootstrap_resamples,
        "seed": inputs.seed,
        "notes": list(dict.fromkeys(work.notes)),
    }
    return EvaluationResult(evaluation, work.samples, work.seconds)


def _task_json(task: Task, work: _Work, bootstrap: Bootstrap, chance: Mapping[str, Any]) -> dict[str, Any]:
    candidates = {}
    for (name, candidate), scored in work.results.items():
        if name == task.name:
            metrics = scored.metrics_json(resamples=bootstrap.resamples, confidence=bootstrap.confidence, seed=bootstrap.seed)
            candidates[candidate] = {"metrics": metrics, "template_sha256": scored.template_sha256, **work.entries[name, candidate]}
    wanted = GUARDED if task is work.inputs.general else work.section.candidates
    reason = "there are no items" if not task.items else None
    absent = {name: reason or work.absent.get(name, "it was not asked for") for name in wanted if name not in candidates}
    prompts = {"prompt_sha256": work.prompt_hashes.get(task.name)}
    return {**task_summary(task), **prompts, "chance": dict(chance), "candidates": candidates, "not_measured": absent}
