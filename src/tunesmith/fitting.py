"""Making stages fit: the memory that a stage takes from its own batches, and the settings, where the recipe leaves them open, that fit.

What the recipe says is never changed. A micro-batch that is left open is lowered, and the accumulation raised, so that the update keeps its
rows and the loss stays the same; then gradients are checkpointed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from .data.batching import Batch, DatasetSource
from .generate.engine import BATCH_TOKENS, LOGIT_ELEMENTS
from .models.costs import MethodCost, method_cost
from .models.footprint import MOMENTS, Footprint, generation_bytes, train_footprint
from .models.methods import resolve
from .models.result import is_adapter, read_card
from .models.roofline import MASTER_BYTES, Shape, Tokens, model_shape
from .models.room import available_memory
from .recipe import WHOLE, ZERO, LoraMethod, Recipe, Stage
from .rundir import launched, rank, world
from .session import Session
from .train.memory import held_bytes, peak_memory_bytes
from .train.samplers import ROLLOUT_BATCH
from .train.scoring import locate_result, named_models
from .train.shaping import Shaping
from .train.work import learns_from_answers, probe_batch
from .train.zero import BUCKET

SAMPLED_WINDOWS = 20  # updates looked at to know how many tokens are shared
KEPT_FREE = 0.1  # of the room, where settings are chosen to fit: a prediction is no measurement
# DeepSpeed's own, under zero3: numbers that stay gathered at most, and that are fetched beforehand.
LIVE, PREFETCHED = 1_000_000_000, 50_000_000
# Times the weights: what a CPU's allocator keeps of those that were loaded, gathered and fetched. 135M by LoRA in two processes, from whose
# peaks it is: 2.6 in fp32, 2.25 in bf16. Not measured on a GPU, where it is taken to be none.
KEPT_BY_A_CPU = 2.4
FITTED = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")


def fit_stages(session: Session) -> list[Stage]:
    """The session's derived stages, with settings that the recipe leaves open such that they fit, where any do.

    A resumed run keeps what it began with, and of several processes each what the first, which goes ahead, has written: they deal out the
    same rows only if their batches are as large. Nothing is raised here: the plan says what does not fit.
    """
    shape, room = model_shape(session.loaded), (1 - KEPT_FREE) * memory_room(session)
    earlier = _earlier_stages(session)
    stages = []
    for given, derived in zip(session.recipe.stages, session.stages, strict=True):
        known = earlier.get(derived.name, {})
        if all(known.get(name) is not None and getattr(given, name) in (None, known[name]) for name in FITTED):
            stages.append(derived.model_copy(update={name: known[name] for name in FITTED}))
        else:
            fits = (one for one in _variants(given, derived) if stage_memory(session, shape, one) <= room)
            stages.append(next(fits, derived))
    return stages


def memory_room(session: Session) -> int:
    """Bytes that this process may hold in all. Processes on one machine share its memory; each has a GPU of its own."""
    beside = 1 if torch.cuda.is_available() else int(os.environ.get("LOCAL_WORLD_SIZE", session.recipe.launch.nproc_per_node or 1))
    return available_memory() // beside + held_bytes()


def processes_there(recipe: Recipe) -> int:
    """Those that there are, or that the recipe would start: a run may have begun with others."""
    return world() if launched() else recipe.launch.nodes * (recipe.launch.nproc_per_node or 1)


def _earlier_stages(session: Session) -> dict[str, dict[str, Any]]:
    """The stages of the run that is resumed, or that the first process has prepared, by name, as its own recipe says."""
    path = session.run.path / "recipe.yaml"
    if not (session.run.resumed or rank() > 0) or not path.is_file():
        return {}
    return {stage["name"]: stage for stage in yaml.safe_load(path.read_text())["stages"]}


def _variants(given: Stage, derived: Stage) -> Iterator[Stage]:
    """The derived stage, then others that make the same updates in less memory, of what `given` leaves open."""
    update = derived.per_device_train_batch_size * derived.gradient_accumulation_steps
    sizes = [derived.per_device_train_batch_size]
    if given.per_device_train_batch_size is None and given.gradient_accumulation_steps is None:
        sizes = [size for size in range(sizes[0], 0, -1) if update % size == 0]
    checkpointed = (False, True) if given.gradient_checkpointing is None else (derived.gradient_checkpointing,)
    for again in checkpointed:
        for size in sizes:
            steps = derived.gradient_accumulation_steps if learns_from_answers(derived) else update // size
            yield derived.model_copy(update=dict(zip(FITTED, (size, steps, again), strict=True)))


def nearest_that_fits(session: Session, stage: Stage, room: int) -> str:
    """What to change of a stage that does not fit, with what it would then need; or that nothing helps. KEPT_FREE stays free."""
    shape = model_shape(session.loaded)
    open_ = stage.model_copy(update=dict.fromkeys(FITTED) | {"gradient_checkpointing": stage.gradient_checkpointing or None})
    tried = list(_variants(open_, stage))
    if stage.method.type in WHOLE:
        lora = stage.model_copy(update={"method": resolve(session.loaded.model, LoraMethod())})
        tried += list(_variants(open_, lora))
    needs = [stage_memory(session, shape, one) for one in tried]
    for one, need in zip(tried, needs, strict=True):
        if need <= (1 - KEPT_FREE) * room:
            return f"the nearest that fits, with {need / 1e9:.2f} GB: {_changes(stage, one)}"
    least = int(np.argmin(needs))
    even = f"{_changes(stage, tried[least])} needs {needs[least] / 1e9:.2f} GB, with {KEPT_FREE:.0%} to be kept free"
    return f"no setting fits: even {even}; take shorter rows or a smaller model"


def _changes(stage: Stage, other: Stage) -> str:
    changed = [f"{name}: {str(getattr(other, name)).lower()}" for name in FITTED if getattr(other, name) != getattr(stage, name)]
    if other.method.type != stage.method.type:
        changed.insert(0, f"method: {other.method.type}")
    return ", ".join(changed) or "as it is"


class Update(NamedTuple):
    """What an update takes."""

    tokens: float
    """Of its rows, shared ones in each row."""
    work: Tokens
    largest: int
    """Tokens that its largest batch computes, with learned ones."""


def update_of(session: Session, stage: Stage, cost: MethodCost) -> Update:
    """The means over some updates; of answers yet to be sampled, see `_update_of_answers`."""
    if learns_from_answers(stage):
        return _update_of_answers(session, stage, cost)
    source = DatasetSource(
        session.data_of(stage).items,
        batch_size=stage.per_device_train_batch_size,
        accumulation=stage.gradient_accumulation_steps,
        seed=session.recipe.seed,
    )
    windows = [source.window(step).batches for step in range(min(SAMPLED_WINDOWS, stage.max_steps))]
    batches = [batch for window in windows for batch in window]
    found = np.array([_tokens_of(batch, cost) for batch in batches])
    sums = found.sum(0) / len(windows)
    tokens, computed, supervised, pairs = (float(value) for value in sums)
    work = Tokens(computed, supervised, pairs, batches=len(batches) / len(windows))
    return Update(tokens, work, int(found[:, 1].max()))


def probe_work(session: Session, stage: Stage, cost: MethodCost) -> Tokens:
    """The rows on which a stage is checked before its first update."""
    _, computed, supervised, pairs = _tokens_of(probe_batch(session.data_of(stage)), cost)
    return Tokens(computed, supervised, pairs)


def _tokens_of(batch: Batch, cost: MethodCost) -> tuple[float, ...]:
    """Tokens, computed ones, supervised ones, pairs that attention looks at; learned tokens are computed once a batch."""
    forest, lengths = batch.forest, batch.forest.lengths_B
    pairs = float((lengths.astype(np.float64) ** 2).sum() / 2)
    return int(lengths.sum()), len(forest.tokens_T) + cost.virtual_tokens, len(forest.target_S), pairs


def _update_of_answers(session: Session, stage: Stage, cost: MethodCost) -> Update:
    """One mini-batch of the answers that are learned from, each taken to be as long as it may; a prompt is computed once for its group."""
    prompt, new, group = prompt_tokens(session, stage), stage.rollout.max_new_tokens, stage.objective.num_generations
    parts = Shaping.of(stage).parts
    answers = learned(stage) / parts
    batch = min(math.ceil(answers), stage.per_device_train_batch_size)
    largest = cost.virtual_tokens + math.ceil(batch / group) * prompt + batch * new
    prompts = min(stage.rollout.prompts_per_step / parts, answers)
    pairs = answers * (prompt + new) ** 2 / 2
    batches = answers / batch
    work = Tokens(prompts * prompt + answers * new + cost.virtual_tokens * batches, answers * new, pairs, batches=batches)
    return Update(answers * (prompt + new), work, int(largest))


def prompt_tokens(session: Session, stage: Stage) -> float:
    """The mean length of a stage's prompts."""
    return float(session.data_of(stage).train.lengths.mean())


def sampled(stage: Stage) -> int:
    """Answers of an iteration."""
    return stage.rollout.prompts_per_step * stage.objective.num_generations


def learned(stage: Stage) -> int:
    """Those of an iteration's answers that are learned from, where no two rewards are alike."""
    return len(Shaping.of(stage).select(np.arange(sampled(stage), dtype=np.float64)))


def stage_memory(session: Session, shape: Shape, stage: Stage) -> int:
    """Peak bytes of a stage."""
    return sum(stage_footprint(session, shape, stage).values())


def stage_footprint(session: Session, shape: Shape, stage: Stage) -> Footprint:
    """The parts of a stage's peak, with the models that it holds beside its policy."""
    cost = method_cost(session.loaded.model, stage.method)
    largest = update_of(session, stage, cost).largest
    parts = train_footprint(
        shape,
        stage,
        cost,
        bare=session.bare,
        batch_tokens=largest,
        probe_tokens=len(probe_batch(session.data_of(stage)).forest.tokens_T),
        mapped=_is_mapped(session, shape),
    )
    launch, processes = session.recipe.launch, processes_there(session.recipe)
    if launch.strategy in ZERO and processes > 1:
        share = cost.trainable // processes  # fp32 masters beside the weights, and fp32 gradients, which are sent from a buffer
        parts |= {"optimiser": share * (MASTER_BYTES + MOMENTS[stage.optim]), "gradients": 4 * (share + min(BUCKET, cost.trainable))}
        if launch.strategy == "zero3":  # whole while it is loaded; then its share, and what is gathered or fetched beforehand
            held = shape.weights // processes + min(LIVE + PREFETCHED, shape.parameters) * shape.itemsize
            parts["weights"] += max(0, held - shape.weights)
            parts["weights"] += 0 if torch.cuda.is_available() else int(KEPT_BY_A_CPU * shape.weights)
    elif launch.strategy != "ddp" and cost.whole:  # the base is loaded whole before it is sharded; what trains is not
        parts |= {name: parts[name] // processes for name in ("gradients", "optimiser")}
    if learns_from_answers(stage):
        parts["weights"] += _models_beside(session, shape, stage)
        sampling = generation_bytes(
            shape,
            items=sampled(stage),
            batch_size=ROLLOUT_BATCH,
            prompt_tokens=float(session.data_of(stage).train.lengths.max()),
            new_tokens=stage.rollout.max_new_tokens,
            batch_tokens=BATCH_TOKENS,
            logit_elements=LOGIT_ELEMENTS,
        )
        parts["rollouts"] += max(0, sampling - parts["activations"] - parts["logits"])  # answers are given before an update has any
    parts["libraries"] += max(0, peak_memory_bytes() - sum(parts.values()))  # of reading the model
    return parts


def _is_mapped(session: Session, shape: Shape) -> bool:
    """Whether the model's files hold the weights as the model does, so that loading maps them into memory."""
    stored: float = sum(file.stat().st_size for file in Path(session.loaded.identity.folder or ".").glob("*.safetensors"))
    return 0.95 < stored / shape.weights < 1.05


def _models_beside(session: Session, shape: Shape, stage: Stage) -> int:
    """Bytes of a sampling stage's reference, where it is a copy (of an adapter it is the base, or another adapter), and reward models.

    A reward model that is an adapter on the policy's base costs its weights; any other is a model of its own, and one of this run as large
    as the policy. Of what an earlier run or another tool made, the files' sizes count.
    """
    full, stages = stage.method.type in WHOLE, {one.name: one for one in session.stages}
    need = shape.weights if full else 0
    for name in named_models(stage.objective):
        if name in stages:
            one, whole = stages[name], shape.weights
            adapter = None if one.method.type in WHOLE else 4 * method_cost(session.loaded.model, one.method).trainable
            base = _base(session, one)
        else:
            folder = locate_result(name, session.run.path)
            files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            adapter, whole = (files, shape.weights) if is_adapter(folder) else (None, files)
            base = None if read_card(folder).get("base", {}).get("sha256") == session.loaded.identity.sha256 else str(folder)
        if adapter is None:
            need += whole
        else:
            need += adapter + (whole if full or base != _base(session, stage) else 0)
    return need


def _base(session: Session, stage: Stage) -> str | None:
    """The stage or folder whose whole model a stage's adapter is on, by name; None for the recipe's base."""
    start, stages = stage.start_from, {one.name: one for one in session.stages}
    if start in stages:
        return start if stages[start].method.type in WHOLE else _base(session, stages[start])
    return None if start is None or is_adapter(locate_result(start, session.run.path)) else start
