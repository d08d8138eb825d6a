"""Windows from the policy's own answers: sample, score, compare with the reference, and make the columns that the objective reads.

    iteration -> prompts -> answers -> rewards -> (old, reference, values) in one pass each -> columns -> `updates` windows

An iteration is a pure function of the weights at its start, the seed and its number: the sample of prompt p is drawn from a stream of its
own, hash(seed, iteration, p, sample). A checkpoint holds the rollouts last made, for the updates that are still to come from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..data.batching import Batch, Window, epoch_order
from ..data.forest import Forest, build_forest
from ..errors import RolloutFailed
from ..generate.protocol import Generation, Sampling
from ..models.policy import Policy
from ..recipe import Stage
from ..score.rewards import Scores
from .buffer import Rollouts, flat
from .scoring import Answer, Prompt, Scorer
from .shaping import Shaping
from .watch import Baseline, broken_rule, watch_answers
from .window import Between, WindowResult

EVALUATED_PROMPTS = 32
SHOWN_SAMPLES = 4


class Sampler(Protocol):
    """Answers of the policy as it is now."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int], iteration: int
    ) -> list[Generation]:
        """One generation a prompt, with its log-probabilities."""


@dataclass(frozen=True)
class Parts:
    """What a rollout source works with."""

    policy: Policy
    sampler: Sampler
    scorer: Scorer
    reference: Callable[[Forest], torch.Tensor]
    """Log-probabilities [S] of the supervised tokens under the reference."""
    gold: Callable[[Sequence[Answer]], np.ndarray] | None = None
    """A measure that is only watched: never a reward."""


class RolloutSource:
    """Windows of a stage that learns from its own answers.

    prompts: what is asked in training; held_out: what the evaluations ask. Raises RolloutFailed where too many answers cannot be scored, or
    sampler and trainer differ by more than their band.
    """

    def __init__(self, stage: Stage, parts: Parts, prompts: Sequence[Prompt], held_out: Sequence[Prompt], *, seed: int):
        self.stage, self.parts, self.prompts, self.seed = stage, parts, prompts, seed
        self.held_out = held_out[:EVALUATED_PROMPTS]
        self.shaping = Shaping.of(stage)
        self.updates = self.shaping.updates
        self.steps_per_epoch = steps_per_pass(stage, len(prompts))
        self.rollouts: Rollouts | None = None
        self.baseline = Baseline()

    def window(self, step: int) -> Window:
        """The batches of update `step`; at the first of an iteration, its answers are sampled."""
        iteration, within = divmod(step, self.updates)
        if self.rollouts is None or self.rollouts.iteration != iteration:
            self.rollouts = self._collect(iteration)
        rollouts = self.rollouts
        stop = broken_rule(self.stage.watch, rollouts.metrics, self.baseline) if within == 0 else None
        return Window(self.shaping.part(rollouts.batches, within, self.seed, iteration), rollouts.metrics, stop)

    def state(self) -> dict[str, torch.Tensor]:
        """The rollouts, for updates that are still to come from them, and what later iterations compare with."""
        held = self.rollouts.state() if self.rollouts is not None else {}
        return {**held, **self.baseline.state(), **self.shaping.state()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up a checkpoint's rollouts."""
        self.baseline.load(state)
        self.shaping.load(state)
        self.rollouts = Rollouts.load(state, self._batches)

    def evaluate(self, between: Between) -> WindowResult:
        """The mean reward of one answer to each held-out prompt, as a loss: its negative."""
        between()
        answers = self._sample(self.held_out, -1, 1)
        scores = self.parts.scorer(answers)
        known = np.isfinite(scores.total)
        reward = float(scores.total[known].mean()) if known.any() else 0.0
        metrics = {"reward": reward, **watch_answers(answers), **self._gold(answers)}
        samples = [
            {"prompt": answer.prompt.record.prompt[-1].content, "answer": answer.generation.text, "reward": _plain(score)}
            for answer, score in zip(answers[:SHOWN_SAMPLES], scores.total[:SHOWN_SAMPLES], strict=True)
        ]
        return WindowResult(-reward, {}, metrics, tuple(samples))

    def _collect(self, iteration: int) -> Rollouts:
        answers = self._sample(self._chosen(iteration), iteration, self.shaping.group)
        scores = self.parts.scorer(answers)
        answers, scores, replaced = self._with_spread(iteration, answers, scores)
        self._require_scores(scores, iteration)
        rows = self.shaping.select(scores.total)
        rollouts = Rollouts(
            iteration=iteration,
            items=np.array([i // self.shaping.group for i in rows]),
            ids=[answers[i].ids for i in rows],
            prompt_lengths=np.array([len(answers[i].prompt.ids) for i in rows]),
            columns={},
            row_columns={"reward_B": scores.total[rows], "finished_B": np.array([_finished(answers[i]) for i in rows])},
            metrics={},
            make=self._batches,
        )
        sampled = [np.array(answers[i].generation.logprobs, dtype=np.float32) for i in rows]
        seen = self._look(rollouts)
        mismatch = self._compare(seen["old_S"], sampled, iteration)
        rollouts.columns.update(seen)
        rollouts.columns["correction_S"] = _corrections(seen["old_S"], sampled, self.stage.rollout.importance_cap)
        shaped = self.shaping.columns(rollouts, scores.total, rows)
        rollouts.columns.update(shaped.columns)
        rollouts.row_columns.update(shaped.row_columns)
        entropy = rollouts.columns.pop("entropy_S")
        rollouts.metrics = {
            "iteration": float(iteration),
            "kl": _mean([float((old - ref).sum()) for old, ref in zip(seen["old_S"], seen["reference_S"], strict=True)]),
            "entropy": _mean(flat(entropy)),
            **_reward_metrics(scores),
            **mismatch,
            **watch_answers(answers),
            **self._gold(answers),
            **shaped.metrics,
            **({"replaced_groups": float(replaced)} if replaced else {}),
        }
        self.baseline.see(rollouts.metrics)
        self.shaping.see(rollouts.metrics)
        rollouts.rebuild()
        return rollouts

    def _chosen(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration: each once a pass, in the pass's own order."""
        count, size = len(self.prompts), self.stage.rollout.prompts_per_step
        places = range(iteration * size, (iteration + 1) * size)
        orders = {epoch: epoch_order(self.seed, epoch, count) for epoch in {place // count for place in places}}
        return [self.prompts[orders[place // count][place % count]] for place in places]

    def _sample(self, prompts: Sequence[Prompt], iteration: int, group: int, first: int = 0) -> list[Answer]:
        """Answers number `first` and on to each prompt, `group` of them."""
        rollout = self.stage.rollout
        asked = [prompt for prompt in prompts for _ in range(group)]
        seeds = [stream(self.seed, iteration, prompt.record.row_id, g) for prompt in prompts for g in range(first, first + group)]
        with self.parts.policy.deterministic():
            made = self.parts.sampler(
                [prompt.ids.tolist() for prompt in asked],
                max_new_tokens=rollout.max_new_tokens,
                sampling=Sampling(temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k),
                seeds=seeds,
                iteration=iteration,
            )
        return [Answer(prompt, generation) for prompt, generation in zip(asked, made, strict=True)]

    def _with_spread(self, iteration: int, answers: list[Answer], scores: Scores) -> tuple[list[Answer], Scores, int]:
        """Replaces groups whose rewards are all alike by groups of other prompts, as often as the recipe says."""
        group, replaced = self.shaping.group, 0
        for attempt in range(self.shaping.dynamic_sampling):
            dull = [g for g in range(len(answers) // group) if not _has_spread(scores.total[g * group : (g + 1) * group])]
            if not dull:
                break
            drawn = np.random.Generator(np.random.Philox(key=[self.seed, (iteration + 1) * 1000 + attempt])).choice(
                len(self.prompts), size=min(len(dull), len(self.prompts)), replace=False
            )
            fresh = self._sample([self.prompts[i] for i in drawn], iteration, group, first=(attempt + 1) * group)
            found = self.parts.scorer(fresh)
            for place, (g, _) in enumerate(zip(dull, drawn, strict=False)):
                new = slice(place * group, (place + 1) * group)
                if not _has_spread(found.total[new]):
                    continue
                old = slice(g * group, (g + 1) * group)
                answers[old] = fresh[new]
                scores.total[old] = found.total[new]
                for name in scores.parts:
                    scores.parts[name][old] = found.parts[name][new]
                replaced += 1
        return answers, scores, replaced

    def _require_scores(self, scores: Scores, iteration: int) -> None:
        lost = float(np.mean(~np.isfinite(scores.total)))
        if lost > self.stage.rollout.max_unscorable or lost == 1.0:
            raise RolloutFailed(
                f"{lost:.0%} of the answers cannot be scored: {'; '.join(scores.errors) or 'the rewards are not finite'}",
                where=f"stage {self.stage.name}, rollouts {iteration}",
                mend="mend the reward function, or raise rollout.max_unscorable",
            )

    def _look(self, rollouts: Rollouts) -> dict[str, list[np.ndarray]]:
        """Each answer's log-probabilities under the policy and the reference, its entropies, and values where the objective has them."""
        policy, needs = self.parts.policy, {"logprobs", "entropy", *({"values"} if self.shaping.values else ())}
        parts: dict[str, list[np.ndarray]] = {"old_S": [], "reference_S": [], "entropy_S": []}
        for batch in self._batches(rollouts):
            with torch.no_grad(), policy.deterministic():
                seen = policy(batch.forest, needs)
            found = {"old_S": seen.logprobs, "entropy_S": seen.entropy, "reference_S": self.parts.reference(batch.forest)}
            if seen.values is not None:
                found["old_value_S"] = seen.values
            cuts = np.flatnonzero(np.diff(batch.forest.row_S)) + 1
            for name, values in found.items():
                parts.setdefault(name, []).extend(np.split(values.float().cpu().numpy(), cuts))
        return parts

    def _compare(self, old: list[np.ndarray], sampled: list[np.ndarray], iteration: int) -> dict[str, float]:
        """How far sampler and trainer differ in log-probability; outside the band the run stops."""
        difference = np.abs(flat(old) - flat(sampled))
        mean = _mean(difference)
        if not mean <= self.stage.rollout.max_mismatch:
            raise RolloutFailed(
                f"sampler and trainer differ by {mean:.3f} in log-probability on average (allowed {self.stage.rollout.max_mismatch})",
                where=f"stage {self.stage.name}, rollouts {iteration}",
                mend="check that the server holds this stage's adapter and base in the same precision, or raise rollout.max_mismatch",
            )
        return {"mismatch": mean, "mismatch_max": float(difference.max(initial=0.0))}

    def _gold(self, answers: Sequence[Answer]) -> dict[str, float]:
        if self.parts.gold is None:
            return {}
        gold = self.parts.gold(answers)
        return {"gold_reward": float(np.nanmean(gold))} if np.isfinite(gold).any() else {}

    def _batches(self, rollouts: Rollouts) -> list[Batch]:
        """The rollouts in forward passes of the stage's batch size, with the columns known so far; a pair stays together."""
        most = min(self.stage.per_device_train_batch_size, -(-len(rollouts.ids) // self.shaping.parts))  # a part is whole batches
        size = max(self.shaping.together, most // self.shaping.together * self.shaping.together)
        return [self._batch(rollouts, range(a, min(a + size, len(rollouts.ids)))) for a in range(0, len(rollouts.ids), size)]

    def _batch(self, rollouts: Rollouts, rows: range) -> Batch:
        weighted = [(rollouts.ids[i], rollouts.weights(i)) for i in rows]
        _, item_B = np.unique(rollouts.items[rows.start : rows.stop], return_inverse=True)
        columns = {name: flat([values[i] for i in rows]) for name, values in rollouts.columns.items()}
        columns |= {name: values[rows.start : rows.stop] for name, values in rollouts.row_columns.items()}
        columns["max_new_tokens"] = np.array([self.stage.rollout.max_new_tokens])
        return Batch(build_forest(weighted), tuple(dict.fromkeys(rollouts.items[rows.start : rows.stop].tolist())), item_B, columns)


def stream(seed: int, iteration: int, row_id: str, sample: int) -> int:
    """The seed of one answer's random stream, 63 bits: nothing else about a batch decides it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{iteration}/{row_id}/{sample}".encode()).digest()[:8], "big") >> 1


def steps_per_pass(stage: Stage, prompts: int) -> int:
    """Updates in one pass over the prompts."""
    return -(-prompts // stage.rollout.prompts_per_step) * Shaping.of(stage).updates


def _finished(answer: Answer) -> bool:
    return answer.generation.finish_reason == "stop"


def _has_spread(rewards: np.ndarray) -> bool:
    known = rewards[np.isfinite(rewards)]
    return len(known) > 1 and float(known.max() - known.min()) > 1e-8


def _corrections(old: list[np.ndarray], sampled: list[np.ndarray], cap: float | None) -> list[np.ndarray]:
    """Truncated importance weights, one a token: trainer's probability over sampler's, at most the cap (Ionides 2008)."""
    if cap is None:
        return [np.ones_like(row) for row in old]
    return [np.minimum(np.exp(mine - theirs), cap).astype(np.float32) for mine, theirs in zip(old, sampled, strict=True)]


def _reward_metrics(scores: Scores) -> dict[str, float]:
    known = np.isfinite(scores.total)
    found = {"reward": float(scores.total[known].mean()), "reward_std": float(scores.total[known].std())}
    for name, values in scores.parts.items():
        if len(scores.parts) > 1 and np.isfinite(values).any():
            found[f"reward/{name}"] = float(np.nanmean(values))
    return {**found, "unscorable": float((~known).sum())}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _plain(score: float) -> float | None:
    return float(score) if np.isfinite(score) else None
