"""Evaluating a session's run: the frozen tasks, the generators of base and tuned model, and what is written of it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .data.records import Conversation
from .data.render import stop_tokens
from .evaluate import EvaluationInputs, TemplateEncoder, evaluate_candidates
from .generate import Constraint, LocalGenerator, choice_constraint, json_schema_constraint
from .models.load import LoadedModel, load_model
from .models.methods import load_adapter
from .models.result import is_adapter, read_card, require_unaltered
from .recipe import ModelSection
from .rundir import MANIFEST, write_json, write_text
from .session import Session

UNITS = "evaluation"  # the folder of finished units, so that a resumed run scores nothing twice


def open_result(folder: Path, loaded: LoadedModel, *, trust_remote_code: bool = False) -> nn.Module:
    """A saved result ready to answer: the adapter on its base, or the fully tuned model.

    loaded: the recipe's base, which an adapter is put on; one that was trained on another stage's full model gets that. trust_remote_code:
    whether code that a tuned model brings may run. Raises CheckpointError where a file is not what was saved.
    """
    require_unaltered(folder)
    dtype = str(loaded.dtype).removeprefix("torch.")

    def whole(name: str) -> LoadedModel:
        return load_model(ModelSection(name=name, dtype=dtype, trust_remote_code=trust_remote_code))

    if not is_adapter(folder):
        return whole(str(folder.resolve())).model
    trained_on = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if read_card(folder).get("base", {}).get("sha256") != loaded.identity.sha256 and trained_on and Path(trained_on).is_dir():
        require_unaltered(Path(trained_on))
        loaded = whole(trained_on)
    return load_adapter(loaded, folder)


def evaluate_run(session: Session) -> dict[str, Any]:
    """Runs every candidate and writes evaluation.json and samples/. Returns evaluation.json's content.

    The tuned model is read from the run directory, also right after training: what is measured is what was saved.
    """
    recipe, data, tasks = session.recipe, session.data, session.tasks
    result = session.run.path / "model"
    trained = result.exists()
    stops = stop_tokens(session.template, session.loaded.tokenizer) if session.template else []

    def generator(model: nn.Module) -> LocalGenerator:
        return LocalGenerator(model, session.loaded.tokenizer, batch_size=recipe.evaluate.batch_size, stop_ids=stops)

    def tuned() -> LocalGenerator:
        return generator(open_result(result, session.loaded, trust_remote_code=recipe.model.trust_remote_code))

    def save(unit: str, payload: dict[str, Any]) -> None:
        session.worked = True
        write_json(session.run.file(f"{UNITS}/{unit}.json"), payload)

    def announce(what: str) -> None:
        session.stop.defer(False)  # raises where a signal came in and a library swallowed what it raised
        session.report({"event": "evaluating", "what": what})

    inputs = EvaluationInputs(
        task=tasks.task,
        training=[r for r in data.records if isinstance(r, Conversation)],
        encoder=TemplateEncoder(session.template, session.loaded.tokenizer),
        base=lambda: generator(session.loaded.model),
        tuned=tuned if trained else None,
        base_id=session.loaded.identity.sha256,
        tuned_id=_result_hash(result) if trained else "",
        max_new_tokens=recipe.evaluate.max_new_tokens,
        vocabulary_size=session.loaded.model.get_input_embeddings().weight.shape[0],
        general=tasks.general,
        validation=tasks.validation,
        constraint=_constraint(tasks.schema, tasks.labels, session.loaded, stops),
        context_length=session.loaded.context,
        training_template_sha256=read_card(result).get("template_sha256"),
        dtype=str(session.loaded.dtype).removeprefix("torch."),
        stop_ids=tuple(stops),
        version=_package_version(),
        seed=recipe.seed,
    )
    folder = session.run.file(UNITS)
    folder.mkdir(exist_ok=True)
    done = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    found = evaluate_candidates(
        recipe.evaluate,
        inputs,
        done=done,
        save=save,
        announce=announce,
    )
    for name, seconds in found.seconds.items():
        session.tell({"event": "phase_part", "of": "evaluate", "name": name, "seconds": seconds})
    for name, lines in found.samples.items():
        write_text(session.run.file(f"samples/{name}.jsonl"), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    found.evaluation["notes"] += [*tasks.notes]
    write_json(session.run.file("evaluation.json"), found.evaluation)
    return found.evaluation


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
    """What the tuned model's scores depend on: its weights, as they lie there now. Raises CheckpointError where they are others."""
    require_unaltered(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    return json.dumps(sorted((name, entry["sha256"]) for name, entry in manifest["files"].items() if name.endswith(".safetensors")))
