"""The evaluation at work: one model after another, each asked for all that is wanted of it, and let go of before the next is loaded.

Takes the evaluate section and the inputs; keeps what is measured so far. Each unit of work is handed to `save` when done and taken from
`done` where nothing that it depends on has changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..generate.protocol import GREEDY, Generator, Sampling
from ..recipe.evaluate import EvaluateSection
from .candidates import (
    CHECKED_ALONE,
    CHECKED_TOKENS,
    Asked,
    Example,
    decoding,
    encode_items,
    encode_messages,
    generate_answers,
    is_checked_alone,
    is_constrained,
    with_examples,
)
from .few_shot import ExampleSet, Trial, choose, draw_sets, selection_json
from .inputs import BASE, TUNED, EvaluationInputs
from .perplexity import ReferenceNats, reference_nats
from .scoring import Scored, generation_json, score_answers, score_labels, score_references
from .task import Item, Task


@dataclass
class Work:
    """The state of one evaluation: what is measured so far."""

    section: EvaluateSection
    inputs: EvaluationInputs
    done: dict[str, dict[str, Any]]
    save: Callable[[str, dict[str, Any]], None]
    announce: Callable[[str], None]
    results: dict[tuple[str, str], Scored] = field(default_factory=dict)
    entries: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    outputs: dict[tuple[str, str], tuple[list[str | None], list[str | None]]] = field(default_factory=dict)
    """(task, candidate) to its answers and why each ended."""
    token_ids: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)
    """(task, candidate) to the answers' tokens, where a language model gave them."""
    seconds: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    prompt_hashes: dict[str, str] = field(default_factory=dict)
    few_shot: dict[str, Any] | None = None
    classical: dict[str, Any] | None = None
    _generators: dict[str, Generator] = field(default_factory=dict)

    @property
    def wanted(self) -> list[str]:
        """Every candidate: those asked for, and stages that only a gate names."""
        stages = {*self.inputs.results, self.inputs.last_stage}
        named = [name for gate in self.section.gates for name in (gate.candidate, gate.better_than, gate.not_worse_than)]
        return list(dict.fromkeys([*self.section.candidates, *(name for name in named if name in stages)]))

    def run_task(self, task: Task) -> None:
        """The candidates on the base model and the classical one; few_shot's choice comes before any test item is read."""
        wanted = self.section.candidates
        if task.is_text:
            self.absent.update(dict.fromkeys(("few_shot", "classical"), "plain text is measured by perplexity alone"))
            self.run_general(task)
            return
        if not task.wants_answers:
            self.absent.update(dict.fromkeys(("few_shot", "classical"), "the items are answers to be compared, which it does not"))
            return
        chosen = self._choose_examples(task) if "few_shot" in wanted else None
        if "zero_shot" in wanted:
            self._language_model(task, "zero_shot", ())
        if chosen is not None:
            self._language_model(task, "few_shot", chosen.examples)
        if "classical" in wanted:
            self._classical(task)

    def run_general(self, general: Task) -> None:
        """The base on the guard set."""
        if "zero_shot" in self.section.candidates:
            self._guard(general, "zero_shot")

    def run_result(self, candidate: str) -> None:
        """A stage's result, or the tuned model, on the task; the tuned model on the guard set too."""
        model = self.inputs.model_of(candidate)
        if not self.has_model(model):
            self.absent[candidate] = "there is no tuned model" if candidate == TUNED else "the stage has no result"
            return
        if self.inputs.result_of(model).compares == "score":
            self.absent[candidate] = "a reward model gives scores and no answers"
            return
        task, general = self.inputs.task, self.inputs.general
        if task and task.items and task.is_text:
            self._guard(task, candidate)
        elif task and task.items and task.wants_answers:
            self._language_model(task, candidate, ())
            if candidate == TUNED:
                self._disagreement(task)
        if general and general.items and candidate == TUNED:
            self._guard(general, candidate)

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
        payload = self._answers(name, validation, "few_shot", self.encode(validation, drawn.examples, references=False))
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

    def _language_model(self, task: Task, candidate: str, examples: Sequence[Example]) -> None:
        model = self.inputs.model_of(candidate)
        asked = self.encode(task, examples)
        self.notes += asked.notes
        made = self._answers(f"{task.name}.{self.unit_name(candidate)}.answers", task, candidate, asked)
        nats, seconds = None, 0.0
        if asked.references:
            nats, seconds = self._perplexity(f"{task.name}.{self.unit_name(candidate)}.perplexity", model, asked)
        texts = [output["text"] for output in made["outputs"]]
        scored = score_answers(task, candidate, texts, nats, template_sha256=self.inputs.encoder.sha256)
        how = decoding(candidate, task, self.section.temperature)
        entry = {"decoding": how, "model": self.model_id(model), "max_new_tokens": self.inputs.max_new_tokens}
        self.keep(scored, {**entry, **generation_json(made["outputs"])}, made["seconds"] + seconds)
        self.outputs[task.name, candidate] = (texts, [output["finish_reason"] for output in made["outputs"]])
        self.token_ids[task.name, candidate] = [output["token_ids"] for output in made["outputs"]]

    def _disagreement(self, task: Task) -> None:
        """Notes how many of some bf16 answers depend on what else is in the batch: its rounding is no property of the model."""
        if not is_checked_alone(task, self.section, self.inputs.dtype):
            return
        from ..generate.local import batch_disagreement  # imported here: torch, which the rest of the evaluation does without

        prompts = self.encode(task, (), references=False).prompts[:CHECKED_ALONE]
        limit = min(self.inputs.max_new_tokens, CHECKED_TOKENS)

        def compare() -> dict[str, Any]:
            generator = self.generator(TUNED)
            return {"share": batch_disagreement(generator, prompts, max_new_tokens=limit), "notes": notes_of(generator)}

        what = f"tuned: {len(prompts)} answers together and alone"
        payload = self.unit(f"{task.name}.tuned.alone", [self.model_id(TUNED), limit, prompts], compare, what)
        self.seconds["alone.tuned"] = payload["seconds"]
        different = round(payload["share"] * len(prompts))
        self.notes.append(f"{different} of {len(prompts)} answers differ in bf16 when generated alone (tuned, the first {limit} tokens)")

    def _guard(self, general: Task, candidate: str) -> None:
        model = self.inputs.model_of(candidate)
        unit = f"{general.name}.{self.unit_name(candidate)}.perplexity"
        nats, seconds = self._perplexity(unit, model, self.encode(general, (), max_new_tokens=0))
        scored = score_references(general, candidate, nats, template_sha256=self.inputs.encoder.sha256)
        self.keep(scored, {"model": self.model_id(model)}, seconds)
        self.outputs[general.name, candidate] = ([None] * len(general.items), [None] * len(general.items))

    def _classical(self, task: Task) -> None:
        if not task.label_fields:
            self.absent["classical"] = "the answers have no label fields"
            return
        if not self.inputs.training:
            self.absent["classical"] = "there are no training rows"
            return
        if not task.has_references:
            self.absent["classical"] = next(iter(task.without_reference.values()))
            return
        # Imported here: scikit-learn costs a second that an evaluation without this candidate need not pay.
        from .classical import answer_text, classical_answers

        def fit() -> dict[str, Any]:
            found = classical_answers(self.inputs.training, self.inputs.validation, task)
            return {"labels": list(found.labels), "trials": list(found.trials), "C": found.C}

        rows = [row.row_id for row in self.inputs.training]
        checks = self.inputs.validation.sha256 if self.inputs.validation else None
        payload = self.unit(f"{task.name}.classical", [task.sha256, checks, rows], fit, "classical: TF-IDF and logistic regression")
        self.classical = {"C": payload["C"], "trials": payload["trials"]}
        scored = score_labels(task, "classical", payload["labels"])
        self.keep(scored, {}, payload["seconds"])
        self.outputs[task.name, "classical"] = ([answer_text(labels, task) for labels in payload["labels"]], [None] * len(task.items))

    def _answers(self, unit: str, task: Task, candidate: str, asked: Asked) -> dict[str, Any]:
        model, temperature = self.inputs.model_of(candidate), self.section.temperature
        how = decoding(candidate, task, temperature)
        constraint = self.inputs.constraint if is_constrained(candidate, task) else None
        limit = self.inputs.max_new_tokens
        sampling, seeds = GREEDY, None
        if temperature:
            from ..generate.sampling import stream_seed  # imported here: torch

            sampling = Sampling(temperature, seed=self.inputs.seed)
            seeds = [stream_seed(self.inputs.seed, "evaluate", item.item_id) for item in task.items]  # the same for each candidate

        def generate() -> dict[str, Any]:
            generator = self.generator(model)
            answers = generate_answers(
                generator, asked.prompts, max_new_tokens=limit, constraint=constraint, sampling=sampling, seeds=seeds
            )
            return {"outputs": [answer.to_json() for answer in answers], "notes": notes_of(generator)}

        key = [task.sha256, self.model_id(model), how, limit, asked.prompts, seeds]
        return self.unit(unit, key, generate, f"{candidate}: {len(asked.prompts)} answers to {task.name} ({how} decoding)")

    def _perplexity(self, unit: str, model: str, asked: Asked) -> tuple[ReferenceNats, float]:
        def measure() -> dict[str, Any]:
            generator = self.generator(model)
            found = reference_nats(generator, asked.prompts, asked.references)
            return {"nats": list(found.nats), "tokens": list(found.tokens), "notes": notes_of(generator)}

        key = [self.model_id(model), asked.prompts, asked.references]
        payload = self.unit(unit, key, measure, f"{unit}: {len(asked.prompts)} references")
        return ReferenceNats(tuple(payload["nats"]), tuple(payload["tokens"])), payload["seconds"]

    def unit(self, unit: str, key: Any, compute: Callable[[], dict[str, Any]], words: str) -> dict[str, Any]:
        """The unit's payload, from an earlier call if its key is the same, else computed and saved."""
        made_with = [self.inputs.version, self.inputs.dtype, list(self.inputs.stop_ids)]
        fingerprint = _hash([unit, self.inputs.encoder.sha256, made_with, key])
        payload = self.done.get(unit)
        if payload is None or payload.get("fingerprint") != fingerprint:
            self.announce(words)
            start = time.perf_counter()
            payload = {"fingerprint": fingerprint, **compute()}
            payload["seconds"] = time.perf_counter() - start
            self.done[unit] = payload
            self.save(unit, payload)
        self.notes += payload.get("notes", [])
        return payload

    def encode(self, task: Task, examples: Sequence[Example], *, references: bool = True, max_new_tokens: int | None = None) -> Asked:
        """The task's prompts, and its references where every item has one."""
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

    def generator(self, model: str) -> Generator:
        """A model's generator, opened once; any other is let go of first."""
        if model not in self._generators:
            self.release()
            self._generators[model] = self.inputs.result_of(model).open()
        return self._generators[model]

    def has_model(self, model: str) -> bool:
        """Whether there is such a result."""
        return model == BASE or (self.inputs.tuned is not None if model == TUNED else model in self.inputs.results)

    def release(self) -> None:
        """Lets go of the model at hand."""
        self._generators.clear()

    def model_id(self, model: str) -> str:
        """The hash of a model's weights."""
        return self.inputs.result_of(model).identity

    def keep(self, scored: Scored, entry: dict[str, Any], seconds: float) -> None:
        """A candidate's scores on a task, with what else its entry says and the seconds it took; added to what is there."""
        key = scored.task, scored.candidate
        name = ".".join(key)
        self.results[key] = scored
        self.entries[key] = {**self.entries.get(key, {}), **entry}
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def samples(self, tasks: Sequence[Task]) -> dict[str, list[dict[str, Any]]]:
        """ "TASK.CANDIDATE" to a line an item."""
        found = {}
        for task in tasks:
            for (name, candidate), (outputs, reasons) in self.outputs.items():
                if name == task.name:
                    scores = self.results[name, candidate].item_scores
                    found[f"{name}.{candidate}"] = [_sample(*one) for one in zip(task.items, outputs, reasons, scores, strict=True)]
        return found

    def unit_name(self, candidate: str) -> str:
        """What a candidate's units are called: the last stage's are the tuned model's, and nothing is scored twice."""
        model = self.inputs.model_of(candidate)
        return candidate if model == BASE else model


def _sample(item: Item, output: str | None, reason: str | None, scores: dict[str, float]) -> dict[str, Any]:
    return {
        "item_id": item.item_id,
        "prompt": [message.as_given() for message in item.messages],
        "reference": item.reference,
        "output": output,
        "finish_reason": reason,
        "scores": scores,
    }


def notes_of(generator: Any) -> list[str]:
    """What a generator says of the way that it took, to be saved with what it gave."""
    return [*getattr(generator, "notes", ())]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
