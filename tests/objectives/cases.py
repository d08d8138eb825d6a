"""Every objective with settings, items of its kind and columns that fit: what the tests of objectives share.

A `Case` holds items (each the rows of one conversation, pair, ranking or sampled answer) with their columns, and cuts batches of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tests.families import tiny_model
from torch import Tensor, nn

from tunesmith.data.batching import Batch
from tunesmith.data.forest import build_forest
from tunesmith.models.policy import Policy, TokenOutputs
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.recipe import objective as settings

VOCABULARY = 97
Row = tuple[np.ndarray, np.ndarray]


@dataclass
class Case:
    """Items and what is known of them. columns: by name, one value an item (_I), a row (_B), an array of tokens a row (_S), or for all."""

    objective: Objective
    items: Sequence[tuple[Row, ...]]
    columns: dict[str, Any] = field(default_factory=dict)

    def batch(self, chosen: Sequence[int] | None = None) -> Batch:
        """The chosen items as one batch, or all."""
        chosen = range(len(self.items)) if chosen is None else chosen
        first = np.cumsum([0, *map(len, self.items)])
        rows = [int(first[i]) + k for i in chosen for k in range(len(self.items[i]))]
        flat = [row for item in self.items for row in item]
        item_B = np.concatenate([np.full(len(self.items[i]), place) for place, i in enumerate(chosen)])
        columns = {}
        for name, values in self.columns.items():
            if name.endswith("_I"):
                columns[name] = np.asarray(values)[list(chosen)]
            elif name.endswith("_B"):
                columns[name] = np.asarray(values)[rows]
            elif name.endswith("_S"):
                columns[name] = np.concatenate([values[row] for row in rows])
            else:
                columns[name] = np.asarray(values)
        return Batch(build_forest([flat[row] for row in rows]), tuple(chosen), item_B, columns)

    def batches(self, size: int) -> list[Batch]:
        """All items in order, `size` a batch; the last may be smaller."""
        return [self.batch(range(i, min(i + size, len(self.items)))) for i in range(0, len(self.items), size)]


PAIRED = {
    "dpo": settings.DPOObjective(),
    "dpo conservative": settings.DPOObjective(label_smoothing=0.1),
    "dpo ipo": settings.DPOObjective(loss="ipo"),
    "dpo robust": settings.DPOObjective(loss="robust", label_smoothing=0.1),
    "dpo length-normalised": settings.DPOObjective(length_normalised=True, beta=2.0),
    "dpo without reference": settings.DPOObjective(reference="none"),
    "dpo with sft": settings.DPOObjective(sft_coef=0.5),
    "simpo": settings.SimPOObjective(sft_coef=0.3),
    "orpo": settings.ORPOObjective(),
    "cpo": settings.CPOObjective(label_smoothing=0.1),
    "online_dpo": settings.OnlineDPOObjective.model_construct(loss="sigmoid", beta=0.1),
}
RANKED = {
    "ranking plackett_luce": settings.RankingObjective(sft_coef=0.2),
    "ranking all_pairs": settings.RankingObjective(loss="all_pairs"),
    "ranking without reference": settings.RankingObjective(reference="none"),
    "reward all_pairs": settings.RewardObjective(center_rewards_coefficient=0.1),
    "reward plackett_luce": settings.RewardObjective(loss="plackett_luce"),
}
SAMPLED = {
    "ppo": settings.PPOObjective(reward_model="reward"),
    "grpo grpo": settings.GRPOObjective.model_construct(loss_type="grpo", kl_coef=0.1, epsilon=0.2, epsilon_high=0.4),
    "grpo dr_grpo": settings.GRPOObjective.model_construct(loss_type="dr_grpo", kl_coef=0.0, epsilon=0.2, epsilon_high=None),
    "grpo dapo": settings.GRPOObjective.model_construct(loss_type="dapo", kl_coef=0.1, epsilon=0.2, epsilon_high=0.4),
    "rloo": settings.RLOOObjective.model_construct(epsilon=0.2),
}
SINGLE = {
    "sft": settings.SFTObjective(),
    "best_of_n": settings.BestOfNObjective.model_construct(),
    "kto": settings.KTOObjective(desirable_weight=1.5),
}
VARIANTS: Mapping[str, Any] = PAIRED | RANKED | SAMPLED | SINGLE


def make_policy() -> Policy:
    """A tiny Llama with a value and a score head, whose weights are not 0."""
    policy = Policy(tiny_model("llama"))
    torch.manual_seed(1)
    policy.heads["value"], policy.heads["score"] = nn.Linear(32, 1), nn.Linear(32, 1)
    return policy


def make_objective(name: str) -> Objective:
    """The objective of a variant, made from its settings."""
    return OBJECTIVES[VARIANTS[name].type](VARIANTS[name])


def make_items(name: str, *, count: int = 8, seed: int = 0) -> list[tuple[Row, ...]]:
    """Items of a variant's kind: answers of 1 to 8 tokens after a prompt of 2 to 20 that the item's rows share."""
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        prompt = rng.integers(1, VOCABULARY, int(rng.integers(2, 21)))
        answers = 2 if name in PAIRED else 2 + i % 3 if name in RANKED else 1
        items.append(tuple(_row(prompt, rng.integers(1, VOCABULARY, int(rng.integers(1, 9)))) for _ in range(answers)))
    return items


def _row(prompt: np.ndarray, answer: np.ndarray) -> Row:
    weights = np.concatenate([np.zeros(len(prompt)), np.ones(len(answer))]).astype(np.float32)
    return np.concatenate([prompt, answer]), weights


def make_case(name: str, policy: Policy | None = None, *, seed: int = 0, drift: float = 0.3) -> Case:
    """A variant's case: columns are the policy's own log-probabilities (or random ones) with noise of deviation `drift`."""
    rng = np.random.default_rng(seed + 1)
    items = make_items(name, seed=seed)
    rows = [row for item in items for row in item]
    own = [logprobs_of(policy, row) if policy else -rng.exponential(3, int(row[1].sum())) for row in rows]

    def noisy() -> list[np.ndarray]:
        return [(values + drift * rng.standard_normal(len(values))).astype(np.float32) for values in own]

    def free() -> list[np.ndarray]:
        return [rng.standard_normal(len(values)).astype(np.float32) for values in own]

    columns: dict[str, Any] = {"reference_B": np.array([values.astype(np.float64).sum() + drift * rng.standard_normal() for values in own])}
    if name in SAMPLED:
        columns = {"old_S": noisy(), "reference_S": noisy(), "return_S": free(), "old_value_S": free(), "max_new_tokens": [16]}
        advantages = [np.float32(rng.standard_normal()) for _ in rows]
        columns["advantage_S"] = [np.full(len(values), a, dtype=np.float32) for a, values in zip(advantages, own, strict=True)]
        columns["correction_S"] = [rng.uniform(0.5, 2, len(values)).astype(np.float32) for values in own]
    if name.startswith("reward"):
        columns = {"margin_I": np.array([0.5, np.nan] * (len(items) // 2), dtype=np.float32)}
    if name == "kto":
        columns |= {"label_I": np.array([True, False, True, True, False, False, True, False]), "kto_z0": np.array(0.7)}
    return Case(make_objective(name), items, columns)


def logprobs_of(policy: Policy, row: Row) -> np.ndarray:
    """The policy's log-probabilities of a row's supervised tokens, the row alone."""
    with torch.no_grad():
        return policy(build_forest([row]), {"logprobs"}).logprobs.numpy()


def random_outputs(batch: Batch, *, seed: int = 0) -> dict[str, Tensor]:
    """Outputs of no model: float64 leaves near the columns' log-probabilities where the batch has any."""
    generator = torch.Generator().manual_seed(seed)
    tokens, rows = len(batch.forest.target_S), len(batch.forest.lengths_B)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    near = torch.as_tensor(batch.columns["old_S"]).double() if "old_S" in batch.columns else -2 + 0 * normal(tokens)
    return {
        "logprobs": (near + 0.3 * normal(tokens)).clamp(max=-1e-3),
        "entropy": normal(tokens).abs(),
        "values": normal(tokens),
        "scores": normal(rows),
    }


def loss_of(objective: Objective, batch: Batch, outputs: dict[str, Tensor]) -> Tensor:
    """The loss of one batch alone, with its gradient."""
    divisors = objective.divisors(batch)
    terms = objective.terms(TokenOutputs(**outputs), batch)
    assert terms.keys() == divisors.keys()
    return torch.stack([(term.coefficient * term.sum / divisors[name]).double() for name, term in terms.items()]).sum()
