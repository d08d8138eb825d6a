"""What a stage's loop works with: policy, objective, source of windows and evaluation, from fixed data or from the policy's own answers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..data.batching import Batch
from ..data.forest import Forest, build_forest
from ..data.items import Items
from ..data.preference import Kind, PromptOnly
from ..data.prepare import PreparedData
from ..models.adapters import REFERENCE, copy_policy
from ..models.heads import HEADS, load_head, make_head
from ..models.load import LoadedModel
from ..models.policy import Policy
from ..models.result import is_adapter
from ..models.virtual import learns_tokens
from ..objectives import OBJECTIVES, Objective
from ..recipe import COMPARING, Stage, Strategy
from ..recipe import Objective as ObjectiveSettings
from ..rundir import RunDirectory
from .loop import Source
from .offline import evaluate_rows, make_source
from .rollouts import Parts, RolloutSource
from .samplers import LocalSampler, ServerSampler
from .scoring import Gold, Prompt, gold_of, locate_result, stage_scorer
from .shaping import SHAPINGS
from .sharding import shard
from .window import Between, WindowResult

PROBE_ROWS = 2  # the first rows of training, on which what must hold at step 0 is tried: plain layers take several times the memory


KINDS: dict[str, Kind] = {
    "sft": "conversation",
    "kto": "unpaired",
    "ranking": "ranking",
    "reward": "ranking",
    **dict.fromkeys(("dpo", "simpo", "orpo", "cpo"), "pair"),
    **dict.fromkeys(SHAPINGS, "prompt"),
}


def kind_of(objective: ObjectiveSettings) -> Kind:
    """The kind of record that an objective learns from; where it is a ranking, pairs are rankings of two."""
    return KINDS[objective.type]


@dataclass(frozen=True)
class Work:
    """What the loop gets."""

    policy: Policy
    objective: Objective
    source: Source
    evaluate: Callable[[Between], WindowResult] | None


@dataclass(frozen=True)
class WorkInputs:
    """What it is made from. start: the folder that the stage starts from. key: what its sums of the reference depend on."""

    loaded: LoadedModel
    model: nn.Module
    data: PreparedData
    start: Path | None
    stop_ids: list[int]
    gold: Gold | None
    key: str
    seed: int
    check: Callable[[Policy], None]
    """What must hold of the model at step 0; it may take fast paths out, before anything is computed with them."""
    note: Callable[[str], None]
    """Says what a user should know of the stage."""
    processes: int = 1
    strategy: Strategy = "ddp"
    """How the model lies on the processes, of which there are several where it is not whole on each."""


def learns_from_answers(stage: Stage) -> bool:
    """Whether the stage samples what it learns from."""
    return stage.objective.type in SHAPINGS


@contextmanager
def stage_work(stage: Stage, inputs: WorkInputs, run: RunDirectory) -> Iterator[Work]:
    """A stage's work; what runs beside it (reward functions' processes) ends with the context."""
    objective = OBJECTIVES[stage.objective.type](stage.objective)
    if not learns_from_answers(stage):
        policy = _policy(stage, inputs, objective)
        folder = run.file(f"stages/{stage.name}/reference")
        made = partial(make_source, stage, policy=policy, seed=inputs.seed, key=inputs.key)
        train = made(inputs.data.items, accumulation=stage.gradient_accumulation_steps * inputs.processes, folder=folder / "train")
        held_out = inputs.data.validation_items
        evaluate = None
        if held_out is not None:
            rows = made(held_out, accumulation=1, folder=folder / "validation")
            evaluate = partial(evaluate_rows, policy, objective, rows)
        yield Work(policy, objective, train, evaluate)
        return
    reference = _reference(stage, inputs)  # before the policy: its layers make room for every adapter that there is
    scorer = stage_scorer(stage.objective, inputs.loaded, inputs.model, partial(locate_result, run=run.path))
    with ExitStack() as ends:
        ends.enter_context(scorer)
        policy = _policy(stage, inputs, objective)
        scorer.bind(policy)
        data = inputs.data
        prompts = _prompts(data.records, data.items)
        scorer.check(prompts)
        sampler = _sampler(stage, policy, inputs, run)
        ends.callback(sampler.close)
        source = RolloutSource(
            stage,
            Parts(policy, sampler, scorer, partial(reference, policy), gold_of(inputs.gold)),
            prompts,
            _prompts(data.validation_records, data.validation_items),
            seed=inputs.seed,
        )
        yield Work(policy, objective, source, source.evaluate if source.held_out else None)


def probe_batch(data: PreparedData) -> Batch:
    """A few training rows; of prompts, whose tokens carry no loss, all but the first token are taken to."""
    rows = [data.train[i] for i in range(min(PROBE_ROWS, len(data.train)))]
    rows = [(ids, weights if np.any(weights) else np.r_[0, np.ones(len(ids) - 1)].astype(np.float32)) for ids, weights in rows]
    return Batch(build_forest(rows), tuple(range(len(rows))), np.arange(len(rows)))


def _policy(stage: Stage, inputs: WorkInputs, objective: Objective) -> Policy:
    """The policy with the heads that its objective needs: those that the start has, else new ones."""
    policy = Policy(
        inputs.model,
        gradient_checkpointing=stage.gradient_checkpointing,
        activation_offload=stage.activation_offload,
        temperature=stage.rollout.temperature if learns_from_answers(stage) else 1.0,
        detach_values=getattr(stage.objective, "value", "detached") == "detached",
        sharded=inputs.strategy != "ddp",
    )
    if stage.objective.type in COMPARING:
        policy.model.eval()
    for need, name, seed in (("scores", "score", inputs.seed), ("values", "value", None)):
        if need in objective.needs:
            policy.heads[name] = _head(name, inputs, seed)
    if not objective.needs & {"logprobs", "entropy"}:
        _freeze_unused_head(policy)
    inputs.check(policy)
    if inputs.strategy == "fsdp":
        shard(policy)
    return policy


def _freeze_unused_head(policy: Policy) -> None:
    """Where no token's probability is asked for, what a language head does not share with the embeddings has nothing to learn from: its
    weights, where they are not tied, and its own rows of new tokens, which PEFT keeps in what it wraps the head with."""
    shared = set(policy.causal.get_input_embeddings().parameters())
    for parameter in policy.causal.get_output_embeddings().parameters():
        if parameter not in shared:
            parameter.requires_grad_(False)


def _head(name: str, inputs: WorkInputs, seed: int | None) -> nn.Linear:
    width, device = inputs.loaded.width, inputs.loaded.device
    if inputs.start is not None and (inputs.start / HEADS).is_file():
        from safetensors import safe_open

        with safe_open(inputs.start / HEADS, "pt") as held:
            known = f"{name}.weight" in held.keys()  # noqa: SIM118 - no mapping
        if known:
            return load_head(inputs.start, name, width).to(device).requires_grad_(True)
    return make_head(width, seed=seed, device=device)


Reference = Callable[[Policy, Forest], torch.Tensor]


def _reference(stage: Stage, inputs: WorkInputs) -> Reference:
    """The stage's start, frozen: another adapter of the policy's model, or that model without any; of a full model, a copy.

    Fresh learned tokens are a start of their own, since they change the model's output.
    """
    model = inputs.model
    if not isinstance(model, PeftModel):
        held = copy.deepcopy(model).requires_grad_(False)

        @cache
        def frozen(fast: bool) -> Policy:  # made when it is first asked, once it is known whether the fast paths agree
            return Policy(held, fast=fast, temperature=stage.rollout.temperature)

        return lambda policy, forest: _frozen(frozen(bool(policy.fast_paths.used)), None, forest)
    adapter = REFERENCE if learns_tokens(model) or (inputs.start is not None and is_adapter(inputs.start)) else None
    if adapter is not None:
        copy_policy(model, adapter)
    return lambda policy, forest: _frozen(policy, adapter, forest)


def _frozen(policy: Policy, adapter: str | None, forest: Forest) -> torch.Tensor:
    with policy.using(adapter):
        return policy(forest).logprobs


def _sampler(stage: Stage, policy: Policy, inputs: WorkInputs, run: RunDirectory) -> LocalSampler | ServerSampler:
    if stage.rollout.server is None:
        return LocalSampler(policy, inputs.loaded, inputs.stop_ids, inputs.note)
    return ServerSampler(stage, policy, inputs.loaded, inputs.stop_ids, run)


def _prompts(records: list, items: Items | None) -> list[Prompt]:
    rows = [] if items is None else [items[i][0][0] for i in range(len(items))]
    asked = [record for record in records if isinstance(record, PromptOnly)]
    return [Prompt(record, ids.astype(np.int64)) for record, ids in zip(asked, rows, strict=True)]
