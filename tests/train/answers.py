"""Sources of rollouts on a tiny model, with rewards that are plain functions: what the tests of rollouts, shaping and buffer share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tests.toys import loaded, make_prompts, make_stage, tiny_model, tiny_tokenizer

from tunesmith.generate import LocalGenerator
from tunesmith.models.heads import make_head
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.recipe import LoraMethod
from tunesmith.score.rewards import Scores
from tunesmith.train.rollouts import Parts, RolloutSource
from tunesmith.train.scoring import Answer, Prompt

GROUPED = ("grpo", "rloo", "online_dpo", "best_of_n")
RolloutReward = Callable[[Sequence[Answer]], Sequence[float]]


def mean_token(answers: Sequence[Answer]) -> list[float]:
    """The mean of an answer's token ids, over 100."""
    return [float(np.mean(answer.generation.token_ids)) / 100 for answer in answers]


def objective_of(kind: str, **settings: Any) -> dict[str, Any]:
    """An objective's settings with a reward that no test asks."""
    given = {"num_generations": 3} if kind in GROUPED else {}
    return {"type": kind, "rewards": [{"type": "regex", "pattern": "x"}], **given, **settings}


def make_policy(*, temperature: float = 1.0, changed: float = 0.1, **method: Any) -> Policy:
    """A tiny Llama with an adapter that changes something."""
    model = attach(loaded(tiny_model("llama")), LoraMethod(r=4, **method), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * changed)
    return Policy(model, temperature=temperature)


class Sampler:
    """The policy's own answers; `change` may alter the log-probabilities that it tells of them. asked: how often it was."""

    def __init__(self, policy: Policy, change: Callable[[list[float]], list[float]] | None = None):
        self.generator = LocalGenerator(policy.model, tiny_tokenizer(), batch_size=8, stop_ids=[])
        self.change, self.asked = change, 0

    def __call__(self, prompts: Any, *, max_new_tokens: int, sampling: Any, seeds: Any, iteration: int) -> list[Any]:
        self.asked += 1
        made = self.generator.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, logprobs=True)
        return made if self.change is None else [replace(one, logprobs=self.change(one.logprobs)) for one in made]


def prompts_of(count: int, seed: int = 0) -> list[Prompt]:
    """Prompts of random tokens."""
    made = make_prompts(count, seed=seed)
    return [Prompt(record, ids.astype(np.int64)) for record, (ids, _) in zip(made.records, made.rows, strict=True)]


def make_source(
    objective: dict[str, Any] | str = "grpo",
    *,
    reward: RolloutReward = mean_token,
    policy: Policy | None = None,
    sampler: Any = None,
    prompts: int = 6,
    seed: int = 0,
    gold: Any = None,
    rollout: dict[str, Any] | None = None,
    **stage: Any,
) -> RolloutSource:
    """A source on prompts of its own; `reward` gives every answer's total, NaN where it has none."""
    given = {"prompts_per_step": 4, "max_new_tokens": 6} | (rollout or {})
    objective = objective_of(objective) if isinstance(objective, str) else objective
    made = make_stage(objective=objective, method=LoraMethod(r=4), rollout=given, rows=prompts, **stage)
    policy = policy or make_policy(temperature=made.rollout.temperature)
    if made.objective.type == "ppo":
        policy.heads["value"] = make_head(32, seed=1)

    def score(answers: Sequence[Answer]) -> Scores:
        total = np.array(reward(answers), dtype=np.float64)
        lost = int(np.isnan(total).sum())
        return Scores(total, {"reward": total.copy()}, lost, {"it broke": lost} if lost else {})

    def reference(forest: Any) -> torch.Tensor:
        with policy.using(None):
            return policy(forest).logprobs

    parts = Parts(policy, sampler or Sampler(policy), score, reference, gold)
    return RolloutSource(made, parts, prompts_of(prompts), prompts_of(3, seed=9), seed=seed)
