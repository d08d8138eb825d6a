"""What scores sampled answers: the objective's rewards and reward models as one function, and a gold measure that is only watched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from ..data.preference import PromptOnly
from ..errors import RecipeError
from ..generate.protocol import Generation
from ..models.load import LoadedModel
from ..models.policy import Policy
from ..models.result import is_model
from ..models.reward import RewardModel, Scored, Separate, Shared, open_reward_model
from ..recipe import JSONSchemaReward, ModelReward, Objective, PPOObjective, PythonReward, Reward
from ..rundir import plain
from ..score.rewards import RewardSet, Scores, make_rewards
from .devices import gather, mine

REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class Prompt:
    """What is asked: the row, and its tokens with the generation prompt, int64 [T]."""

    record: PromptOnly
    ids: np.ndarray


@dataclass(frozen=True)
class Answer:
    """One sampled answer and what it was asked."""

    prompt: Prompt
    generation: Generation

    @property
    def ids(self) -> np.ndarray:
        """The prompt's tokens and the answer's, int64."""
        return np.concatenate([self.prompt.ids, np.array(self.generation.token_ids, dtype=np.int64)])


class Scorer(Protocol):
    """Rewards of answers."""

    def __call__(self, answers: Sequence[Answer]) -> Scores:
        """Scores answers in their order."""


def asked(answers: Sequence[Answer]) -> tuple[list[str], list[str], dict[str, list]]:
    """(prompts, completions, columns) as reward functions take them; of the columns, those that every row has, and `messages`."""
    records = [answer.prompt.record for answer in answers]
    names = set.intersection(*(set(record.columns) for record in records)) if records else set()
    columns: dict[str, list] = {name: [record.columns[name] for record in records] for name in sorted(names)}
    columns["messages"] = [[{"role": m.role, "content": m.content} for m in record.prompt] for record in records]
    return [record.prompt[-1].content for record in records], [answer.generation.text for answer in answers], columns


@dataclass
class StageScorer:
    """Every reward of a stage. A context manager, which ends the processes that rewards run in."""

    programs: RewardSet | None
    models: dict[str, tuple[RewardModel, float]] = field(default_factory=dict)
    """By name, with their weights."""
    ensemble: tuple[list[RewardModel], str] | None = None
    """Several as one, by their mean or minimum."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises RecipeError where a reward needs a column that not every row has."""
        if self.programs is not None and prompts:
            names = set.intersection(*(set(prompt.record.columns) for prompt in prompts))
            self.programs.check_columns({"messages", *names})

    def bind(self, policy: Policy) -> None:
        """Tells the reward models that share the policy's base which it is."""
        for model in [*(model for model, _ in self.models.values()), *(self.ensemble[0] if self.ensemble else [])]:
            if isinstance(model, Shared):
                model.policy = policy
            elif isinstance(model, Separate) and not policy.fast_paths.used:
                model.policy.make_plain()

    def __call__(self, answers: Sequence[Answer]) -> Scores:
        """Scores answers; one that any reward cannot score has none in all. Each process scores the answers to its share of the prompts,
        which stand together, and all get all the scores."""
        groups = [list(group) for _, group in groupby(answers, key=lambda answer: id(answer.prompt))]
        own = [answer for group in mine(groups) for answer in group]
        return _joined([part for part in gather(plain(self._scores(own)) if own else None) if part])

    def _scores(self, answers: Sequence[Answer]) -> Scores:
        count = len(answers)
        total, parts, reasons = np.zeros(count), {}, {}
        if self.programs is not None:
            found = self.programs(*asked(answers))
            total, parts, reasons = found.total.copy(), dict(found.parts), dict(found.reasons)
        scored = [Scored(answer.prompt.record.prompt, answer.generation.text, answer.ids) for answer in answers]
        for name, (model, weight) in self.models.items():
            parts[name] = model.scores(scored)
            if weight > 0:  # at 0 it is only watched
                total += weight * parts[name]
        if self.ensemble is not None:
            models, how = self.ensemble
            members = np.stack([model.scores(scored) for model in models])
            parts[REWARD_MODEL] = members.min(axis=0) if how == "min" else members.mean(axis=0)
            if len(models) > 1:
                parts["disagreement"] = members.std(axis=0)
            total += parts[REWARD_MODEL]
        lost = ~np.isfinite(total)
        total[lost] = np.nan
        if lost.any() and not reasons:
            reasons = {"the reward model cannot read the answer": int(lost.sum())}
        return Scores(total, parts, int(lost.sum()), reasons)

    def __enter__(self) -> StageScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.programs is not None:
            self.programs.close()


def _joined(parts: Sequence[dict[str, Any]]) -> Scores:
    """Scores of answers that were scored apart."""
    names = parts[0]["parts"] if parts else {}
    reasons: Counter[str] = sum((Counter(part["reasons"]) for part in parts), Counter())
    return Scores(
        np.array([float(one) for part in parts for one in part["total"]]),
        {name: np.array([float(one) for part in parts for one in part["parts"][name]]) for name in names},
        sum(part["unscorable"] for part in parts),
        dict(reasons),
    )


def stage_scorer(objective: Objective, loaded: LoadedModel, beside: nn.Module | None, locate: Callable[[str], Path]) -> StageScorer:
    """A stage's rewards, with every reward model loaded; those on the policy's base join it as adapters.

    locate: the folder of a stage, run or model that a setting names. Raises RecipeError, AdapterError or ModelError.
    """
    rewards: list[Reward] = list(objective.rewards)
    programs = [reward for reward in rewards if not isinstance(reward, ModelReward)]
    named = [reward for reward in rewards if isinstance(reward, ModelReward)]
    names = [f"model_{Path(reward.model).name}" for reward in named]
    models = {
        (name if names.count(name) == 1 else f"{name}_{i}"): (
            open_reward_model(locate(reward.model), loaded, beside, f"reward_{i}"),
            reward.weight,
        )
        for i, (name, reward) in enumerate(zip(names, named, strict=True))
    }
    ensemble = None
    if isinstance(objective, PPOObjective) and objective.reward_model:
        names = [objective.reward_model] if isinstance(objective.reward_model, str) else objective.reward_model
        ensemble = (
            [open_reward_model(locate(name), loaded, beside, f"ensemble_{i}") for i, name in enumerate(names)],
            objective.ensemble,
        )
    return StageScorer(make_rewards(programs) if programs else None, models, ensemble)


def named_models(objective: Objective) -> list[str]:
    """The reward models that an objective names, as its settings name them."""
    model = getattr(objective, "reward_model", None) or []
    return [*([model] if isinstance(model, str) else model), *(r.model for r in _rewards(objective) if isinstance(r, ModelReward))]


def named_files(objective: Objective) -> dict[int, str]:
    """The files that an objective's rewards are read from, by the reward's place."""
    files = {}
    for i, reward in enumerate(_rewards(objective)):
        if isinstance(reward, PythonReward):
            files[i] = reward.function.rpartition(":")[0]
        elif isinstance(reward, JSONSchemaReward):
            files[i] = reward.output_schema
    return files


def _rewards(objective: Objective) -> list[Reward]:
    return list(getattr(objective, "rewards", []))


def locate_result(named: str, run: Path, *, where: str = "stages") -> Path:
    """The model folder of an earlier stage of this run, an earlier run, or a folder itself. Raises RecipeError."""
    for folder in (run / "stages" / named / "model", Path(named) / "model", Path(named)):
        if is_model(folder):
            return folder
    what = f"`{named}` is no earlier stage, run or model folder"
    raise RecipeError(what, where=where, mend="name one that is there, with its weights as safetensors")


Gold = Callable[[Sequence[str], Sequence[str]], np.ndarray]


def gold_of(gold: Gold | None) -> Callable[[Sequence[Answer]], np.ndarray] | None:
    """A gold measure of (prompts, answers) as one of sampled answers."""
    if gold is None:
        return None

    def measure(answers: Sequence[Answer]) -> np.ndarray:
        prompts, completions, _ = asked(answers)
        return gold(prompts, completions)

    return measure
