"""One stage, whole: derive its settings, put the method on the base, check what must hold at step 0, train, save the result."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.prepare import PreparedData
from ..data.records import Document
from ..data.render import stop_tokens
from ..data.template import ChatTemplate
from ..errors import CheckpointError, RecipeError
from ..models.embeddings import grow_embeddings
from ..models.load import LoadedModel, hash_weights, load_model
from ..models.methods import (
    attach,
    continue_adapter,
    learning_rate_scales,
    method_of,
    resolve,
    save_result,
    starts_unchanged,
    trainable_state,
)
from ..models.methods.tokens import trained_tokens
from ..models.offload import require_device
from ..models.opening import base_folder
from ..models.policy import Policy
from ..models.result import CARD, is_adapter, read_adapter_config, read_card
from ..objectives import SFT
from ..recipe import COMPARING, WHOLE, ZERO, ModelSection, Stage, Strategy
from ..rundir import RunDirectory, atomic_folder, rank, verify_folder, world
from .account import Account, CountedSource
from .devices import same_loops_everywhere, wait
from .invariants import (
    computes_the_models_own,
    every_answer_ends_with_a_stop,
    every_row_carries_loss,
    fast_paths_agree,
    fresh_adapter_changes_nothing,
    no_leak,
    one_start_of_text,
    something_trains,
    starts_alike,
)
from .loop import Job, train
from .loss_scale import LossScale
from .memory import keep_freed_memory, memory_may_run_out, return_freed_memory
from .offline import judge_reward_model
from .optimiser import Optimiser
from .rates import WIDTH, usual_rate
from .rollouts import steps_per_pass
from .scoring import Gold, locate_result, named_files, named_models
from .signals import StopRequest
from .updates import require_optimiser
from .work import WorkInputs, learns_from_answers, probe_batch, stage_work
from .zero import ZeroOptimiser

Report = Callable[[dict[str, Any]], None]
STARTS_AWAY = "{} tuning starts away from the base: fresh learned tokens change what it says, and the first losses show it"
NO_DROPOUT = "{} compares log-probabilities: the adapter's lora_dropout of {} is off in this stage"
ROWS = 8  # of an update, where the recipe names no batch
EVALUATIONS = 5  # in a stage that samples, where the recipe names no steps between them
# They change no weight, which is shown on a CPU; rows are hashed themselves.
UNFINGERPRINTED = {"save_steps", "save_total_limit", "logging_steps", "gradient_checkpointing", "activation_offload", "name", "data"}


def derive_stage(
    stage: Stage, rows: int, *, start: Path | None = None, processes: int = 1, width: int = WIDTH, quantised: bool = False
) -> Stage:
    """The stage with every setting that the recipe left open given its value.

    The micro-batch, its accumulation and checkpointing are those of a machine with room for them: `fitting` lowers them where it has not.
    rows: training items of an epoch. processes: those whose batches make an update together. width: the model's hidden size.
    quantised: whether its weights are held in bits. Raises RecipeError where its optimiser or its offloading cannot work on this
    machine, or where its warm-up outlasts its updates.
    """
    require_optimiser(stage)
    if stage.activation_offload:
        require_device(stage.name)
    sampled = learns_from_answers(stage)
    batch, accumulation = stage.per_device_train_batch_size or ROWS, stage.gradient_accumulation_steps or 1
    stage = stage.model_copy(update={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation})
    size = batch * accumulation * processes
    steps_per_epoch = steps_per_pass(stage, rows) if sampled else math.ceil(rows / size)
    total = stage.max_steps or max(1, math.ceil(stage.num_train_epochs * steps_per_epoch))
    if (stage.warmup_steps or 0) >= total:
        raise RecipeError(
            f"the learning rate rises for {stage.warmup_steps} updates, and the stage has {total}: it would end before its rate is reached",
            where=f"stages.{stage.name}.warmup_steps",
            mend=f"at most {total - 1}, or leave it out for a twentieth of the updates",
        )
    between = min(steps_per_epoch, max(1, total // EVALUATIONS)) if sampled else steps_per_epoch
    method = stage.method or method_of(start)
    derived = {
        "method": method,
        "learning_rate": stage.learning_rate or usual_rate(method, stage.objective, width=width, quantised=quantised),
        "max_steps": total,
        "warmup_steps": total // 20 if stage.warmup_steps is None else stage.warmup_steps,
        "eval_steps": stage.eval_steps or between,
        "save_steps": stage.save_steps or between,
        "gradient_checkpointing": stage.gradient_checkpointing or False,
    }
    return stage.model_copy(update=derived)


def locate_start(stage: Stage, run: Path) -> Path | None:
    """The model folder a stage starts from: an earlier stage's of this run, an earlier run's, or an adapter's own. None for the base."""
    return None if stage.start_from is None else locate_result(stage.start_from, run, where=f"stages.{stage.name}.start_from")


def add_new_tokens(loaded: LoadedModel, template: ChatTemplate | None) -> list[int]:
    """Adds the tokens that a named template brings to tokenizer and embeddings. Returns their ids, which must train."""
    if template is None:
        return []
    loaded.tokenizer.chat_template = template.text
    if not template.new_tokens:
        return []
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": list(template.new_tokens)})
    grow_embeddings(loaded.model, len(loaded.tokenizer))
    return loaded.tokenizer.convert_tokens_to_ids(list(template.new_tokens))


def build_model(loaded: LoadedModel, stage: Stage, start: Path | None, seed: int, new_tokens: list[int]) -> nn.Module:
    """The model to train: the base with a fresh adapter, with an earlier one, or in full."""
    if start is not None and is_adapter(start):
        if stage.method.type in WHOLE:
            raise RecipeError(
                f"{stage.method.type} tuning cannot start from an adapter",
                where=f"stages.{stage.name}",
                mend="leave method out: it is that of start_from; or start from the base",
            )
        if not trained_tokens(read_adapter_config(start)).issuperset(new_tokens):
            raise RecipeError(
                "the chat template brings tokens that the adapter of start_from has no rows for, so that they would not train",
                where=f"stages.{stage.name}.start_from",
                mend="start from the base, or from an adapter that was trained with this template",
            )
        return continue_adapter(loaded, stage.method, start)
    return attach(loaded, stage.method, seed=seed, new_tokens=new_tokens)


def _base(inputs: StageInputs) -> LoadedModel:
    """What the stage's method is put on: the recipe's base, or the full model of an earlier stage, which may be the one that the adapter
    of start_from was trained on; with the template's new tokens.

    Raises RecipeError where that model's tokenizer has other tokens than the rows were made with.
    """
    loaded, start = inputs.loaded, inputs.start
    if start is not None and is_adapter(start):
        beneath = None if _base_sha256(start, loaded) == loaded.identity.sha256 else base_folder(start)
        start = beneath if beneath is not None and (beneath / CARD).is_file() else None  # any other base is refused with the adapter
    if start is None:
        return loaded
    other = {"name": str(start.resolve()), "revision": None, "dtype": str(loaded.dtype).removeprefix("torch.")}
    earlier = load_model(inputs.section.model_copy(update=other))
    add_new_tokens(earlier, inputs.template)
    if not loaded.tokenizer.get_vocab().items() <= earlier.tokenizer.get_vocab().items():
        raise RecipeError(
            "the model of start_from has other tokens than the recipe's base, with which the rows were made",
            where=str(start),
            mend="name this model as model.name, and leave start_from out",
        )
    earlier.tokenizer.chat_template = loaded.tokenizer.chat_template
    return earlier


@dataclass(frozen=True)
class StageInputs:
    """What a stage trains on and from."""

    loaded: LoadedModel
    """The recipe's base, with the template's new tokens."""
    section: ModelSection
    """How it was loaded, for another base that the stage may start from."""
    data: PreparedData
    template: ChatTemplate | None
    new_tokens: list[int]
    system: str | None
    """The system message that all rows share, for the result's card."""
    start: Path | None
    """The model folder that the stage starts from, if not the base."""
    seed: int
    gold: Gold | None = None
    """A measure that is watched while answers are sampled."""
    processes: int = 1
    """Those whose batches make an update together; as many or as few as there are share the work."""
    strategy: Strategy = "ddp"
    """How the model lies on the processes, if there are several."""


def run_stage(stage: Stage, inputs: StageInputs, run: RunDirectory, *, stop: StopRequest, report: Report) -> nn.Module:
    """Trains a derived stage to its end and writes stages/NAME/model. Returns the tuned model, for the evaluation that follows."""
    began, account = time.perf_counter(), Account()
    data, seed = inputs.data, inputs.seed
    loaded = _base(inputs)
    same_loops_everywhere()
    model = build_model(loaded, stage, inputs.start, seed, inputs.new_tokens)
    fingerprint = stage_fingerprint(stage, loaded, data, inputs.template, inputs.start, seed, run.path, inputs.processes)
    starts_alike(stage, fingerprint, loaded, model)
    stops = stop_tokens(inputs.template, loaded.tokenizer) if inputs.template else []
    _check_rows(stage, inputs, loaded)

    def check(policy: Policy) -> None:
        _check_step_0(stage, inputs, loaded, policy)
        if reasons := policy.fast_paths.refused:
            _tell(run, report, {"event": "fast_paths_dropped", "stage": stage.name, "paths": sorted(reasons), "reasons": reasons})
        return_freed_memory()

    def note(text: str) -> None:
        _tell(run, report, {"event": "note", "stage": stage.name, "note": text})

    if not starts_unchanged(stage.method) and (inputs.start is None or not is_adapter(inputs.start)):
        note(STARTS_AWAY.format(stage.method.type))
    if stage.objective.type in COMPARING and getattr(stage.method, "lora_dropout", 0):
        note(NO_DROPOUT.format(stage.objective.type, stage.method.lora_dropout))
    strategy: Strategy = inputs.strategy if world() > 1 else "ddp"
    given = WorkInputs(loaded, model, data, inputs.start, stops, inputs.gold, fingerprint, seed, check, note, inputs.processes, strategy)
    with stage_work(stage, given, run) as work:
        optimiser = _optimiser(stage, work.policy, strategy, loaded.dtype)
        job = Job(
            stage=stage,
            policy=work.policy,
            objective=work.objective,
            source=CountedSource(work.source, account),
            optimiser=optimiser,
            run=run,
            fingerprint=fingerprint,
            evaluate=None if work.evaluate is None else account.counted("validate", work.evaluate),
            stop=stop,
            report=report,
        )
        keep_freed_memory()
        torch.manual_seed(seed + rank())  # of dropout: no two processes have the same masks
        account.seconds["start"] = time.perf_counter() - began
        with memory_may_run_out(stage.name):
            progress = train(job)
        return_freed_memory()
        if stage.objective.type == "reward":
            judged = judge_reward_model(work.policy, data.validation_items, stage.per_device_train_batch_size)
            _tell(run, report, {"event": "reward_model", "stage": stage.name, "step": progress.step, **judged})
        card = {
            "template_sha256": inputs.template.sha256 if inputs.template else None,
            "stage": stage.name,
            "objective": stage.objective.type,
            "method": stage.method.model_dump(mode="json"),
            "steps": progress.step,
            "system": inputs.system,
            "fingerprint": fingerprint,
        }
        _write_result(run.file(f"stages/{stage.name}/model"), work.policy, loaded, card, strategy)
        optimiser.close()
    done = {"event": "stage_finished", "stage": stage.name, "step": progress.step, "tokens": progress.tokens}
    spent = {"train_seconds": progress.seconds, "seconds": time.perf_counter() - began}
    phases = _phases(account, progress.seconds, spent["seconds"], resumed=run.resumed)
    _tell(run, report, {**done, **spent, "phases": phases, "best_step": progress.best_step, "stopped_early": progress.stopped_early})
    return model.eval()


def _write_result(path: Path, policy: Policy, loaded: LoadedModel, card: dict[str, Any], strategy: Strategy) -> None:
    """The first process writes the stage's model; of a sharded one, all give their parts."""
    with policy.whole() if strategy in ZERO else nullcontext():
        state = trainable_state(policy.model) if strategy == "fsdp" else None
        if rank() == 0:
            with atomic_folder(path) as folder:
                save_result(policy.model, loaded, folder, card, policy.heads, state)
        wait()


def _optimiser(stage: Stage, policy: Policy, strategy: Strategy, dtype: torch.dtype) -> Optimiser | ZeroOptimiser:
    scales = learning_rate_scales(policy, stage.method)
    if strategy in ZERO:
        return ZeroOptimiser(policy, stage, level=ZERO[strategy], scales=scales)
    loss_scale = LossScale() if dtype == torch.float16 else None
    return Optimiser(policy.named_parameters(), stage, scales=scales, tables=_tables(policy), loss_scale=loss_scale)


def _tables(policy: Policy) -> set[str]:
    """Names of the weights that stand between tokens, or numbers, and hidden states: embeddings and heads."""
    modules = [m for m in policy.modules() if isinstance(m, nn.Embedding)]
    modules += [policy.causal.get_input_embeddings(), policy.causal.get_output_embeddings(), *policy.heads.values()]  # new tokens' rows too
    held = {id(parameter) for module in modules for parameter in module.parameters()}
    return {name for name, parameter in policy.named_parameters() if id(parameter) in held}


def _phases(account: Account, updates: float, whole: float, *, resumed: bool) -> dict[str, float]:
    """Seconds of each phase; what is no other's was spent on writing. A resumed stage's updates are of all its parts, and the rest cannot
    be told apart."""
    spent = dict(account.seconds) | {"train": updates - account.seconds["sample"]}
    return {"train": updates} if resumed else spent | {"save": max(0.0, whole - sum(spent.values()))}


def _check_rows(stage: Stage, inputs: StageInputs, loaded: LoadedModel) -> None:
    """What must hold of the rows before anything is computed."""
    train, tokenizer = inputs.data.train, loaded.tokenizer
    one_start_of_text(train, train.row_ids, tokenizer.bos_token_id)
    if learns_from_answers(stage):
        return
    every_row_carries_loss(train, train.row_ids)
    if inputs.template is not None:
        is_whole = train.store.lengths[list(train.positions)] <= train.limit
        texts = isinstance(inputs.data.records[0], Document)
        whole = [] if texts else [int(i) for i in np.flatnonzero(is_whole)]
        names = [train.row_ids[i] for i in whole]
        every_answer_ends_with_a_stop((train[i] for i in whole), names, stop_tokens(inputs.template, tokenizer))


def _check_step_0(stage: Stage, inputs: StageInputs, loaded: LoadedModel, policy: Policy) -> None:
    """What must hold of the model before the first update; a fast path that does not agree is taken out."""
    something_trains(policy)
    first = probe_batch(inputs.data)
    computes_the_models_own(policy)
    with policy.deterministic():
        no_leak(policy, loaded.model.get_input_embeddings().weight.shape[0])
        if starts_unchanged(stage.method) and (inputs.start is None or not is_adapter(inputs.start)):
            fresh_adapter_changes_nothing(policy, first)
        fast_paths_agree(policy, SFT(), first)


def _tell(run: RunDirectory, report: Report, event: dict[str, Any]) -> None:
    run.log(event)
    report(event)


def stage_fingerprint(
    stage: Stage,
    loaded: LoadedModel,
    data: PreparedData,
    template: ChatTemplate | None,
    start: Path | None,
    seed: int,
    run: Path,
    processes: int = 1,
) -> str:
    """A hash of all that decides the weights of a step; the token stores' keys cover system text, template, tokenizer and renderer."""
    settings = {key: value for key, value in stage.model_dump(mode="json").items() if key not in UNFINGERPRINTED}
    rows = [hashlib.sha256("\n".join(part.row_ids).encode()).hexdigest() for part in (data.train, data.validation) if part is not None]
    origin = hash_weights(start) if start is not None else None
    base = loaded.identity.sha256 if start is None else _base_sha256(start, loaded) if is_adapter(start) else origin
    tokens = [json.loads((part.store.folder / "key.json").read_text()) for part in (data.train, data.validation) if part is not None]
    held = [str(loaded.dtype), loaded.quantization, *([loaded.rope_scaling] if loaded.rope_scaling else [])]
    what = [settings, base, origin, held, rows, tokens, template.sha256 if template else None, data.max_length, seed]
    what += [processes] if processes > 1 else []
    what += [hash_weights(locate_result(name, run)) for name in named_models(stage.objective)]
    what += [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in named_files(stage.objective).values()]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _base_sha256(adapter: Path, loaded: LoadedModel) -> str:
    """Of the base that an adapter of ours was trained on; of the recipe's for another's, which does not say."""
    return read_card(adapter).get("base", {}).get("sha256", loaded.identity.sha256)


def is_finished(run: RunDirectory, stage: Stage) -> bool:
    """Whether a stage's result is already there, whole, from an earlier part of a resumed run."""
    folder = run.path / "stages" / stage.name / "model"
    if not (folder / CARD).is_file():
        return False
    try:
        verify_folder(folder)
    except CheckpointError as error:
        run.log({"event": "result_refused", "stage": stage.name, "reason": error.what})
        return False
    return True


def resolve_method(stage: Stage, loaded: LoadedModel, adapter: Path | None = None) -> Stage:
    """The stage with its method's derived settings written out. adapter: the folder of the one whose method it is, and not the recipe's.

    Raises RecipeError where a name matches nothing, with the nearest.
    """
    try:
        return stage.model_copy(update={"method": resolve(loaded.model, stage.method)})
    except RecipeError as error:
        if adapter is None:
            raise
        mend = "start from an adapter on linear layers of the model's backbone, such as q_proj or up_proj"
        raise RecipeError(f"the adapter cannot be trained on: {error.what}", where=str(adapter), mend=mend) from error
