"""Evaluating a session's run: the frozen tasks, the generators of base and tuned model, and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peft import PeftModel
from torch import nn

from .data.records import Conversation
from .data.render import stop_tokens
from .evaluate import EvaluationInputs, TemplateEncoder, derive_max_new_tokens, evaluate_candidates
from .generate import GREEDY, Constraint, Generation, Generator, LocalGenerator, Sampling, choice_constraint, json_schema_constraint
from .models.load import LoadedModel, load_model
from .models.methods import CARD, load_adapter
from .recipe import ModelSection
from .rundir import write_json, write_text

if TYPE_CHECKING:
    from .pipeline import Session

UNITS = "evaluation"  # the folder of finished units, so that a resumed run scores nothing twice


class _WithoutAdapter:
    """The base as a generator: the tuned model with its adapter switched off, so that the weights are held once."""

    def __init__(self, generator: LocalGenerator, model: PeftModel):
        self.generator, self.model = generator, model

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling = GREEDY, constraint: Constraint | None = None
    ) -> list[Generation]:
        """As the generator's, without the adapter."""
        with self.model.disable_adapter():
            return self.generator.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling, constraint=constraint)

    def logprobs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """As the generator's, without the adapter."""
        with self.model.disable_adapter():
            return self.generator.logprobs(prompts, answers)


def tuned_model(session: Session) -> nn.Module | None:
    """The tuned model: in memory after training, else from the run directory; None where nothing was trained."""
    folder = session.run.path / "model"
    if session.model is None and folder.exists():
        session.model = open_result(folder, session.loaded)
    return session.model


def open_result(folder: Path, loaded: LoadedModel) -> nn.Module:
    """A saved result ready to answer: the adapter on its base, or the fully tuned model."""
    if (folder / "adapter_config.json").is_file():
        return load_adapter(loaded, folder)
    dtype = str(loaded.dtype).removeprefix("torch.")
    return load_model(ModelSection(name=str(folder.resolve()), dtype=dtype)).model


def evaluate_run(session: Session) -> dict[str, Any]:
    """Runs every candidate and writes evaluation.json and samples/. Returns evaluation.json's content."""
    recipe, data, tasks = session.recipe, session.data, session.tasks
    model = tuned_model(session)
    stops = stop_tokens(session.template, session.loaded.tokenizer) if session.template else []
    base, tuned = _generators(session, model, stops)
    inputs = EvaluationInputs(
        task=tasks.task,
        training=[r for r in data.records if isinstance(r, Conversation)],
        encoder=TemplateEncoder(session.template, session.loaded.tokenizer),
        base=base,
        tuned=tuned,
        base_id=session.loaded.identity.sha256,
        tuned_id=_result_hash(session.run.path / "model") if model is not None else "",
        max_new_tokens=recipe.evaluate.max_new_tokens or derive_max_new_tokens(int(np.count_nonzero(w)) for _, w in data.train),
        vocabulary_size=session.loaded.model.get_input_embeddings().weight.shape[0],
        general=tasks.general,
        validation=tasks.validation,
        constraint=_constraint(tasks.schema, tasks.labels, session.loaded, stops),
        context_length=session.loaded.context,
        training_template_sha256=_trained_with(session.run.path / "model"),
        seed=recipe.seed,
    )
    folder = session.run.file(UNITS)
    folder.mkdir(exist_ok=True)
    done = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    result = evaluate_candidates(
        recipe.evaluate,
        inputs,
        done=done,
        save=lambda unit, payload: write_json(session.run.file(f"{UNITS}/{unit}.json"), payload),
        announce=lambda what: session.report({"event": "evaluating", "what": what}),
    )
    for name, seconds in result.seconds.items():
        session.tell({"event": "phase_part", "of": "evaluate", "name": name, "seconds": seconds})
    for name, lines in result.samples.items():
        write_text(session.run.file(f"samples/{name}.jsonl"), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result.evaluation["notes"] += [*tasks.notes]
    write_json(session.run.file("evaluation.json"), result.evaluation)
    return result.evaluation


def _constraint(schema: dict[str, Any] | None, labels: Sequence[str] | None, loaded: LoadedModel, stops: list[int]) -> Constraint | None:
    if schema is not None:
        return json_schema_constraint(schema, loaded.tokenizer, stop_ids=stops)
    return choice_constraint(labels, loaded.tokenizer, stop_ids=stops) if labels else None


def _generators(
    session: Session, model: nn.Module | None, stops: list[int]
) -> tuple[Callable[[], Generator], Callable[[], Generator] | None]:
    """Makers of the base's and of the tuned model's generator."""
    tokenizer, size = session.loaded.tokenizer, session.recipe.evaluate.batch_size

    def local(of: nn.Module) -> LocalGenerator:
        return LocalGenerator(of, tokenizer, batch_size=size, stop_ids=stops)

    if model is None:
        return lambda: local(session.loaded.model), None
    if isinstance(model, PeftModel):
        return lambda: _WithoutAdapter(local(model), model), lambda: local(model)
    trained_in_place = model is session.loaded.model
    return lambda: local(load_model(session.recipe.model).model if trained_in_place else session.loaded.model), lambda: local(model)


def _card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CARD).read_text()) if (folder / CARD).is_file() else {}


def _trained_with(folder: Path) -> str | None:
    return _card(folder).get("template_sha256")


def _result_hash(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    return json.dumps(sorted((name, entry["sha256"]) for name, entry in manifest["files"].items() if name.endswith(".safetensors")))
