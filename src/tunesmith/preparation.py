"""Preparing a session: model, chat template, data, tasks and every derived setting, before anything is trained.

Takes a session with its recipe and open run directory; fills its fields and writes recipe.yaml and manifest.json. The recipe's data are
what the tasks are about; a stage that brings data of its own, or trains on other turns, has them prepared in data/STAGE/.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .data.preference import AnyRecord, Kind, PromptOnly
from .data.prepare import PreparedData, Rendering, prepare_data
from .data.read import locate
from .data.render import TrainOn
from .data.template import load_template
from .errors import CheckpointError, MissingFile, OtherSettings, RecipeError, TunesmithError
from .evaluate import TemplateEncoder, check_gates, derive_max_new_tokens
from .fitting import fit_stages, processes_there
from .models.load import LoadedModel, load_model
from .models.result import is_adapter, read_card, require_unaltered
from .objectives import OBJECTIVES
from .recipe import WHOLE, ZERO, DataSection, ModelReward, Recipe, Stage, dump_recipe, load_recipe, virtual_tokens_of
from .rundir import manifest, rank, verify_folder, write_json, write_text
from .score.rewards import make_rewards
from .session import Session
from .tasks import encodable_tasks, make_tasks
from .train.checkpoint import read_state
from .train.scoring import locate_result, named_files, named_models
from .train.stage import UNFINGERPRINTED, add_new_tokens, derive_stage, locate_start, resolve_method, stage_fingerprint
from .train.work import kind_of, learns_from_answers
from .train.zero import require_deepspeed, require_one_type

FROM_ROWS = {"max_steps", "warmup_steps", "eval_steps"}  # settings that, left open, follow from the number of rows


def run_path(recipe: Recipe) -> Path:
    """The run directory of a recipe."""
    return Path(recipe.output.dir or Path("runs") / recipe.name)


def require_files(recipe: Recipe) -> None:
    """Names a missing file, model or library, or a gate's unknown metric, before anything is loaded. Raises MissingFile or RecipeError."""
    if _by_deepspeed(recipe):
        require_deepspeed(recipe.launch.strategy)
    check_gates(recipe.evaluate.gates, None)  # by name; which of them the task can have is known when its rows are
    named = {"task.output_schema": recipe.task.output_schema, "evaluate.general": recipe.evaluate.general}
    for stage in recipe.stages:
        named |= {f"stages.{stage.name}.objective.rewards.{i}": file for i, file in named_files(stage.objective).items()}
    if recipe.task.gold_reward:
        named["task.gold_reward"] = recipe.task.gold_reward.rpartition(":")[0]
    for key, value in named.items():
        if value is not None and not Path(value).is_file():
            raise MissingFile("no such file", where=f"{key}: {value}", mend="paths in a recipe start at the recipe's folder")
    for section in (recipe.data, *(stage.data for stage in recipe.stages if stage.data is not None)):
        for source in (section.train, section.test, section.validation):
            if isinstance(source, str) and Path(source).is_absolute() and not Path(source).exists():
                locate(source)
    stages = {stage.name for stage in recipe.stages}
    for stage in recipe.stages:
        if stage.start_from not in stages:
            locate_start(stage, run_path(recipe))
        for name in (name for name in named_models(stage.objective) if name not in stages):
            locate_result(name, run_path(recipe), where=f"stages.{stage.name}.objective")


def prepare(session: Session) -> None:
    """Model, template, data, tasks and derived stages; writes recipe.yaml and manifest.json."""
    session.recipe = recipe = _with_processes(session)
    with session.phase("load"):
        session.loaded = load_model(recipe.model)
        if session.loaded.tokenizer.chat_template or recipe.model.chat_template is not None:
            session.template = load_template(session.loaded.tokenizer, recipe.model)
        session.new_tokens = add_new_tokens(session.loaded, session.template)
    with session.phase("data"):
        _prepare_data(session)
    session.stages = _derived_stages(session)
    session.stages = fit_stages(session)
    for stage in session.stages:
        _require_room(session, stage)
        _require_one_type(session, stage)
        _require_same_result(session, stage)
        _require_rewards(session, stage)
        _require_held_out(session, stage)
    session.data.write_account(session.run)
    for name, data in session.stage_data.items():
        data.write_account(session.run, f"data/{name}")
    tasks = make_tasks(recipe, session.data, session.stage_data.values(), has_template=session.template is not None)
    room = recipe.evaluate.max_new_tokens or derive_max_new_tokens(int(np.count_nonzero(weights)) for _, weights in session.data.train)
    encoder = TemplateEncoder(session.template, session.loaded.tokenizer)
    session.tasks = encodable_tasks(tasks, encoder, max_new_tokens=room, context_length=session.context)
    session.recipe = _resolved(session, room)
    write_text(session.run.file("recipe.yaml"), dump_recipe(session.recipe))
    hashes = {part: source["sha256"] for part, source in session.data.sources.items()}
    about = manifest(session.recipe.model_dump(), session.loaded.identity.public(), hashes, {"seed": recipe.seed})
    about["data"] = session.data.sources
    about["stage_data"] = {name: data.sources for name, data in session.stage_data.items()}
    about["chat_template_sha256"] = session.template.sha256 if session.template else None
    write_json(session.run.file("manifest.json"), about)


def _with_processes(session: Session) -> Recipe:
    """The recipe with the number of processes that share an update: its own, that of the run which goes on, else those that there are, or
    that a plan is made for."""
    launch, before = session.recipe.launch, session.run.path / "recipe.yaml"
    count = launch.processes
    if count is None and session.run.resumed and before.is_file():
        count = load_recipe(before).launch.processes
    launch = launch.model_copy(update={"processes": count or processes_there(session.recipe)})
    return session.recipe.model_copy(update={"launch": launch})


def _require_rewards(session: Session, stage: Stage) -> None:
    """Tries a stage's rewards out before anything is trained: functions, and the columns that they ask for."""
    if not learns_from_answers(stage):
        return
    programs = [reward for reward in stage.objective.rewards if not isinstance(reward, ModelReward)]
    if programs:
        with make_rewards(programs) as rewards:
            rows = [set(record.columns) for record in session.data_of(stage).records if isinstance(record, PromptOnly)]
            rewards.check_columns({"messages", *set.intersection(*rows)})


def _require_held_out(session: Session, stage: Stage) -> None:
    """What a stage is to choose by, its loss on held-out rows, must be there. Raises RecipeError."""
    asked = [name for name in ("early_stopping_patience", "load_best_model_at_end") if getattr(stage, name)]
    if asked and session.data_of(stage).validation_items is None:
        raise RecipeError(
            f"{asked[0]} needs held-out rows, and none were held out: rows that share their prompt stay on one side",
            where=f"stages.{stage.name}.{asked[0]}",
            mend="name a file of other rows in data.validation, or leave it out",
        )


def fresh_base(session: Session) -> LoadedModel:
    """The base read anew, with the template's new tokens: what a stage trains on and what the evaluation answers with."""
    loaded = load_model(session.recipe.model)
    add_new_tokens(loaded, session.template)
    return loaded


def _prepare_data(session: Session) -> None:
    """The recipe's rows, rendered as the first stage without rows of its own trains on them; then those of the other stages."""
    recipe = session.recipe
    sharing = [stage for stage in recipe.stages if stage.data is None]
    shared = _rows_of(sharing[0]) if sharing else Wanted(None)

    def prepared(section: DataSection, wanted: Wanted, folder: str, kept_apart: Sequence[AnyRecord] = ()) -> PreparedData:
        context = session.context - wanted.room
        how = Rendering(session.template, session.loaded.tokenizer, context, recipe.task.description, wanted.train_on)
        return prepare_data(section, session.run, how, seed=recipe.seed, folder=folder, kept_apart=kept_apart, kind=wanted.kind)

    session.data = prepared(recipe.data, shared, "data")
    for stage in recipe.stages:
        if stage.data is not None or _rows_of(stage) != shared:
            section = stage.data or recipe.data
            session.stage_data[stage.name] = prepared(section, _rows_of(stage), f"data/{stage.name}", session.data.test_records)
    if not sharing:
        session.data.notes.append("no stage trains on the rows of data.train: they serve as examples and for the classical candidate")


class Wanted(NamedTuple):
    """What is prepared of a data section. kind: None takes any; room: tokens of the context to leave for an answer."""

    kind: Kind | None
    train_on: TrainOn = "all"
    room: int = 0


def _rows_of(stage: Stage) -> Wanted:
    """What a stage learns from."""
    room = stage.rollout.max_new_tokens if learns_from_answers(stage) else 0
    return Wanted(kind_of(stage.objective), getattr(stage.objective, "train_on", "all"), room)


def _derived_stages(session: Session) -> list[Stage]:
    """Every stage with its open settings filled in. Raises RecipeError where a stage cannot start from what it names."""
    done: dict[str, Stage] = {}
    known = {
        "processes": session.recipe.launch.processes,
        "width": session.loaded.model.config.get_text_config().hidden_size,
        "quantised": session.recipe.model.quantization is not None,
    }
    for stage in session.recipe.stages:
        start = None if stage.start_from in done else locate_start(stage, session.run.path)
        if start is not None:
            require_unaltered(start)
        rows = len(session.data_of(stage).items)
        if stage.start_from in done:
            inherited = done[stage.start_from].method
        elif start is not None:
            own = derive_stage(stage.model_copy(update={"method": None}), rows, start=start, **known)
            inherited = (resolve_method(own, session.loaded, start) if is_adapter(start) else own).method
        else:
            inherited = None
        derived = stage if stage.method else stage.model_copy(update={"method": inherited})
        derived = resolve_method(derive_stage(derived, rows, start=start, **known), session.loaded)
        _require_same_method(derived, stage, inherited)
        if stage.learning_rate is None:
            whose = f"{derived.method.type}, {stage.objective.type} and a model {known['width']} wide"
            session.data.notes.append(f"stage {stage.name}: learning rate {derived.learning_rate:g}, derived for {whose}")
        done[stage.name] = derived
    return list(done.values())


def _require_same_method(derived: Stage, given: Stage, start: Any) -> None:
    """A stage that goes on with an adapter trains that adapter: a method that says otherwise is refused and not ignored."""
    if start is None or start.type in WHOLE or given.method is None:
        return
    where = f"stages.{given.name}.method"
    if derived.method.type != start.type:
        raise RecipeError(
            f"{derived.method.type} tuning cannot start from an adapter of {start.type}",
            where=where,
            mend="leave method out: it is that of start_from; or start from the base",
        )
    stated = {name for name in given.method.model_fields_set if getattr(given.method, name) is not None}
    other = sorted(name for name in stated if getattr(derived.method, name) != getattr(start, name))
    if other:
        raise RecipeError(
            f"it goes on with an adapter of {other[0]} {getattr(start, other[0])}, and its method says {getattr(derived.method, other[0])}",
            where=f"{where}.{other[0]}",
            mend="leave method out: it is that of start_from",
        )


def _require_room(session: Session, stage: Stage) -> None:
    """A row, an answer to it that is yet to come, and learned tokens fit the model. Raises RecipeError.

    Only the learned tokens of an adapter that an earlier run trained are not known when the rows are cut.
    """
    learned, longest = virtual_tokens_of(stage.method), session.data_of(stage).max_length + _rows_of(stage).room
    if learned + longest > session.loaded.context:
        raise RecipeError(
            f"rows of {longest} tokens and {learned} learned ones do not fit the model's context of {session.loaded.context}",
            where=f"stages.{stage.name}",
            mend=f"set data.max_length to at most {session.loaded.context - learned - _rows_of(stage).room}, and data.too_long",
        )


def _by_deepspeed(recipe: Recipe) -> bool:
    return recipe.launch.strategy in ZERO and processes_there(recipe) > 1


def _require_one_type(session: Session, stage: Stage) -> None:
    """DeepSpeed trains weights of one type: a base that trains, with its heads. Raises RecipeError."""
    if _by_deepspeed(session.recipe) and stage.method.type in WHOLE:
        heads = {torch.float32} if OBJECTIVES[stage.objective.type](stage.objective).needs & {"scores", "values"} else set()
        held = {p.dtype for p in session.loaded.model.parameters() if p.is_floating_point()}
        require_one_type(stage, {session.loaded.dtype} | heads, held)


def _require_same_result(session: Session, stage: Stage) -> None:
    """What is there of a stage, its result or else its newest checkpoint, must be of what this recipe would train. Raises OtherSettings."""
    folder, made = _there_already(session, stage)
    if made is None:
        return
    start = locate_start(stage, session.run.path)
    seed = session.recipe.seed if stage.seed is None else stage.seed
    made_of = (stage, session.loaded, session.data_of(stage), session.template, start, seed, session.run.path)
    if made != stage_fingerprint(*made_of, session.recipe.launch.processes):
        raise OtherSettings(
            f"stage {stage.name} was trained with other settings or data{_changed(session, stage, seed)}",
            where=str(folder),
            mend=f"use the recipe it was trained with ({session.run.path / 'recipe.yaml'}) and its data, or another folder with --out",
        )


def _there_already(session: Session, stage: Stage) -> tuple[Path, str | None]:
    """The folder of a stage's result, else of its newest whole checkpoint, and its fingerprint; None where there is neither."""
    result = session.run.path / "stages" / stage.name / "model"
    if card := read_card(result):
        return result, card.get("fingerprint", "")
    if rank() > 0 or not all(_is_whole(session, name) for name in (stage.start_from, *named_models(stage.objective))):
        return result, None  # the first process has compared it, or an earlier stage is trained again first: loading it compares too
    newest, _ = session.run.newest_valid_checkpoint(stage.name)
    return (result, None) if newest is None else (newest, read_state(newest)[0])


def _is_whole(session: Session, name: str | None) -> bool:
    """Whether what a stage builds on is there and unaltered, where that is another stage's result."""
    if name not in {stage.name for stage in session.stages}:
        return True
    try:
        verify_folder(session.run.path / "stages" / str(name) / "model")
    except CheckpointError:
        return False
    return True


def _changed(session: Session, stage: Stage, seed: int) -> str:
    """Which settings of a stage and its data differ from those in the run's own recipe, in brackets; empty where that cannot be told.

    A number of updates that the recipe does not name follows from its data, and is said only where nothing else differs; a longest row
    is left out.
    """
    try:
        saved = load_recipe(session.run.path / "recipe.yaml")
    except TunesmithError:
        return ""
    old = next((one for one in saved.stages if one.name == stage.name), None)
    if old is None:
        return ""
    named = next(one for one in session.recipe.stages if one.name == stage.name).model_fields_set
    data = _fixed(stage.data or session.recipe.data, session.data_of(stage))
    was = _flat(old.model_dump(mode="json", exclude=UNFINGERPRINTED)) | {"seed": saved.seed if old.seed is None else old.seed}
    now = _flat(stage.model_dump(mode="json", exclude=UNFINGERPRINTED)) | {"seed": seed}
    open_ = {"max_length"} - (stage.data or session.recipe.data).model_fields_set
    was |= _flat((old.data or saved.data).model_dump(mode="json", exclude=open_), "data.")
    now |= _flat(data.model_dump(mode="json", exclude=open_), "data.")
    differ = {key: f"{key}: {was.get(key)}, now {now.get(key)}" for key in now | was if was.get(key) != now.get(key)}
    changed = [words for key, words in differ.items() if key not in FROM_ROWS - named]
    changed = changed or _other_rows(session, stage) or list(differ.values())
    return f" ({'; '.join(changed)})" if changed else ""


def _other_rows(session: Session, stage: Stage) -> list[str]:
    """Which files of a stage's rows are not what they were, by the run's own manifest."""
    try:
        told = json.loads((session.run.path / "manifest.json").read_text())
        known = told["stage_data"][stage.name] if stage.name in session.stage_data else told["data"]
    except (OSError, ValueError, KeyError):
        return []
    sources = session.data_of(stage).sources
    return [f"data.{part}: other bytes" for part, one in sources.items() if part in known and known[part]["sha256"] != one["sha256"]]


def _flat(settings: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Settings by their dotted places."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {place + key: value}
    return flat


def _resolved(session: Session, max_new_tokens: int) -> Recipe:
    """The recipe with every derived setting: running it again repeats the run."""
    recipe, identity = session.recipe, session.loaded.identity
    stages = [
        stage if stage.data is None else stage.model_copy(update={"data": _fixed(stage.data, session.stage_data[stage.name])})
        for stage in session.stages
    ]
    dtype = str(session.loaded.dtype).removeprefix("torch.")
    model = recipe.model.model_copy(update={"revision": identity.revision, "dtype": dtype})
    output = recipe.output.model_copy(update={"dir": str(session.run.path)})
    evaluation = recipe.evaluate.model_copy(update={"max_new_tokens": max_new_tokens})
    session.stages = stages
    fixed = {"stages": stages, "data": _fixed(recipe.data, session.data), "model": model, "output": output, "evaluate": evaluation}
    if session.tasks.labels is not None and session.tasks.labels_hold:
        fixed["task"] = recipe.task.model_copy(update={"labels": list(session.tasks.labels)})
    return recipe.model_copy(update=fixed)


def _fixed(section: DataSection, data: PreparedData) -> DataSection:
    """The section with its longest row, and hub data sets at the commit that was read, so that the saved recipe reads the same rows."""
    pinned: dict[str, Any] = {"max_length": data.max_length}
    for part, source in data.sources.items():
        if source["revision"]:
            name, colon, split = source["source"].partition(":")
            pinned[part] = f"{name.partition('@')[0]}@{source['revision']}{colon}{split}"
    return section.model_copy(update=pinned)
