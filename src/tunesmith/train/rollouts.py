"""Windows from the policy's own answers: sample, score, compare with the reference, and make the columns that the objective reads.

    iteration -> prompts -> answers -> rewards -> (old, reference, values) in one pass each -> columns -> `updates` windows

An iteration is a pure function of the weights at its start, the seed and its number: the sample of prompt p is drawn from a stream of its
own, hash(seed, iteration, p, sample), where samples count on if a prompt is asked again in the iteration. A checkpoint holds the rollouts
last made, for the updates that are still to come from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from ..data.batching import Batch, Share, Window, deal, epoch_order
from ..data.forest import Forest, build_forest
from ..errors import RolloutFailed
from ..generate.protocol import Generation, Sampling
from ..generate.sampling import stream_seed
from ..models.policy import Policy
from ..objectives import without_spread
from ..recipe import Stage
from ..rundir import rank, world
from ..score.rewards import Scores
from .buffer import Rollouts, flat
from .devices import mine, together
from .scoring import Answer, Prompt, Scorer
from .shaping import Shaping
from .watch import Baseline, broken_rule, watch_answers
from .window import Between, WindowResult

EVALUATED_PROMPTS = 32
EVALUATED_AT_ONCE = 8  # between two looks at whether the run is to stop
SHOWN_SAMPLES = 4


class Sampler(Protocol):
    """Answers of the policy as it is now."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling, seeds: Sequence[int], iteration: int | str
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
        if stop is not None and iteration == 0:
            raise RolloutFailed(
                f"the first answers break the rule {stop['rule']}: {stop['value']:.4g}, and the limit is {stop['limit']:.4g}",
                where=f"stages.{self.stage.name}.watch.{stop['rule']}",
                mend="start from another model, or move the limit; null switches the rule off",
            )
        batches = self.shaping.part(rollouts.parts, within, self.seed, iteration)
        own = [replace(batch, counts=counts) for batch, counts in deal(batches, Share(rank(), world()))]
        return Window(own, rollouts.metrics, stop)

    def state(self) -> dict[str, torch.Tensor]:
        """The rollouts, for updates that are still to come from them, and what later iterations compare with."""
        held = self.rollouts.state() if self.rollouts is not None else {}
        return {**held, **self.baseline.state(), **self.shaping.state()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up a checkpoint's rollouts."""
        self.baseline.load(state)
        self.shaping.load(state)
        self.rollouts = Rollouts.load(state, self._parts)

    def evaluate(self, between: Between) -> WindowResult:
        """The mean reward of one answer to each held-out prompt (the first EVALUATED_PROMPTS of them), as a loss: its negative."""
        with self.parts.policy.whole():
            return self._evaluated(between)

    def _evaluated(self, between: Between) -> WindowResult:
        answers: list[Answer] = []
        taken: Counter[str] = Counter()
        for start in range(0, len(self.held_out), EVALUATED_AT_ONCE):
            between()
            answers += self._sample(self.held_out[start : start + EVALUATED_AT_ONCE], "held out", 1, taken)
        between()
        scores = self.parts.scorer(answers)
        self._require_scores(scores.total, scores.errors, "the held-out prompts")
        known = np.isfinite(scores.total)
        reward = float(scores.total[known].mean())
        metrics = {"reward": reward, "n": float(known.sum()), "unscorable": float((~known).sum())}
        metrics |= {**watch_answers(answers, 1), **self._gold(answers)}
        samples = [
            {"prompt": answer.prompt.record.prompt[-1].content, "answer": answer.generation.text, "reward": _plain(score)}
            for answer, score in zip(answers[:SHOWN_SAMPLES], scores.total[:SHOWN_SAMPLES], strict=True)
        ]
        return WindowResult(-reward, {}, metrics, tuple(samples))

    def _collect(self, iteration: int) -> Rollouts:
        with self.parts.policy.whole():
            return self._collected(iteration)

    def _collected(self, iteration: int) -> Rollouts:
        taken: Counter[str] = Counter()
        answers = self._sample(self._chosen(iteration), iteration, self.shaping.group, taken)
        scores = self.parts.scorer(answers)
        tried, lost = len(answers), int((~np.isfinite(scores.total)).sum())
        for attempt in range(self.shaping.dynamic_sampling):
            more, unscorable = self._replace_dull(iteration, attempt, answers, scores, taken)
            tried, lost = tried + more, lost + unscorable
            if not more:
                break
        self._require_scores(scores.total, scores.errors, f"rollouts {iteration}", share=lost / tried)
        everything = self._rollouts(iteration, answers, scores.total, np.arange(len(answers)))
        seen = self._look(everything)
        sampled = [np.array(answer.generation.logprobs, dtype=np.float32) for answer in answers]
        entropy = seen.pop("entropy_S")
        mismatch = self._compare(seen["old_S"], sampled, iteration)
        seen["correction_S"] = _corrections(seen["old_S"], sampled, self.stage.rollout.importance_cap)
        rows = self.shaping.select(scores.total)
        rollouts = self._rollouts(iteration, answers, scores.total, rows)
        rollouts.columns.update({name: [values[i] for i in rows] for name, values in seen.items()})
        shaped = self.shaping.columns(rollouts, scores.total, rows)
        rollouts.columns.update(shaped.columns)
        rollouts.row_columns.update(shaped.row_columns)
        rollouts.idle = not shaped.learns
        rollouts.metrics = {
            "iteration": float(iteration),
            **self._kl(seen),
            "entropy": _mean(flat(entropy)),
            **_reward_metrics(scores),
            "unscorable": float(lost),
            **({"unscorable_because": "; ".join(scores.errors)} if lost and scores.errors else {}),
            **mismatch,
            **watch_answers(answers, self.shaping.group),
            **self._gold(answers),
            **shaped.metrics,
            **({"sampled_again": float(tried - len(answers))} if tried > len(answers) else {}),
        }
        if self._truncates:
            rollouts.columns.pop("reference_S")  # of truncated answers it would give a KL that is none
        self.baseline.see(rollouts.metrics)
        self.shaping.see(rollouts.metrics)
        rollouts.rebuild()
        return rollouts

    @property
    def _truncates(self) -> bool:
        return self.stage.rollout.top_p < 1 or self.stage.rollout.top_k > 0

    def _kl(self, seen: Mapping[str, list[np.ndarray]]) -> dict[str, float]:
        """The mean KL to the reference, in nats a sequence; of truncated samples there is no such estimate."""
        if self._truncates:
            return {}
        return {"kl": _mean([float((old - ref).sum()) for old, ref in zip(seen["old_S"], seen["reference_S"], strict=True)])}

    def _rollouts(self, iteration: int, answers: Sequence[Answer], rewards: np.ndarray, rows: np.ndarray) -> Rollouts:
        """Some of the answers, without columns yet."""
        return Rollouts(
            iteration=iteration,
            items=np.array([i // self.shaping.group for i in rows], dtype=np.int64),
            ids=[answers[i].ids for i in rows],
            prompt_lengths=np.array([len(answers[i].prompt.ids) for i in rows], dtype=np.int64),
            columns={},
            row_columns={"reward_B": rewards[rows], "finished_B": np.array([_finished(answers[i]) for i in rows], dtype=bool)},
            metrics={},
            make=self._parts,
        )

    def _chosen(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration: each once a pass, in the pass's own order."""
        count, size = len(self.prompts), self.stage.rollout.prompts_per_step
        places = range(iteration * size, (iteration + 1) * size)
        orders = {epoch: epoch_order(self.seed, epoch, count) for epoch in {place // count for place in places}}
        return [self.prompts[orders[place // count][place % count]] for place in places]

    def _sample(self, prompts: Sequence[Prompt], iteration: int | str, group: int, taken: Counter[str]) -> list[Answer]:
        """`group` answers to each prompt, each from a stream of its own. taken: how many each prompt has had in the iteration."""
        rollout = self.stage.rollout
        asked = [prompt for prompt in prompts for _ in range(group)]
        seeds = []
        for prompt in asked:
            seeds.append(stream_seed(self.seed, iteration, prompt.record.row_id, taken[prompt.record.row_id]))
            taken[prompt.record.row_id] += 1
        with self.parts.policy.deterministic():
            made = self.parts.sampler(
                [prompt.ids.tolist() for prompt in asked],
                max_new_tokens=rollout.max_new_tokens,
                sampling=Sampling(temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k),
                seeds=seeds,
                iteration=iteration,
            )
        return [Answer(prompt, generation) for prompt, generation in zip(asked, made, strict=True)]

    def _replace_dull(self, iteration: int, attempt: int, answers: list[Answer], scores: Scores, taken: Counter[str]) -> tuple[int, int]:
        """Replaces groups whose rewards are all alike by groups of other prompts that have spread, in place.

        Returns how many answers were sampled for it, and how many of them could not be scored.
        """
        group = self.shaping.group
        dull = np.flatnonzero(without_spread(scores.total.reshape(-1, group)))
        if not len(dull):
            return 0, 0
        draw = np.random.default_rng(stream_seed(self.seed, "other prompts", iteration, attempt))
        drawn = draw.choice(len(self.prompts), size=min(len(dull), len(self.prompts)), replace=False)
        fresh = self._sample([self.prompts[i] for i in drawn], iteration, group, taken)
        found = self.parts.scorer(fresh)
        lively = np.flatnonzero(~without_spread(found.total.reshape(-1, group)))
        for g, place in zip(dull, lively, strict=False):
            old, new = slice(g * group, (g + 1) * group), slice(place * group, (place + 1) * group)
            answers[old] = fresh[new]
            scores.total[old] = found.total[new]
            for name in scores.parts:
                scores.parts[name][old] = found.parts[name][new]
        for reason, times in found.reasons.items():
            scores.reasons[reason] = scores.reasons.get(reason, 0) + times
        return len(fresh), int((~np.isfinite(found.total)).sum())

    def _require_scores(self, rewards: np.ndarray, reasons: Sequence[str], which: str, *, share: float | None = None) -> None:
        """Raises RolloutFailed where more than the allowed share has no reward, or all. share: of all that was sampled for these."""
        none = bool((~np.isfinite(rewards)).all())
        lost = float(np.mean(~np.isfinite(rewards))) if share is None else share
        if none or lost > self.stage.rollout.max_unscorable:
            raise RolloutFailed(
                f"{lost:.0%} of the answers cannot be scored: {'; '.join(reasons) or 'the rewards are not finite'}",
                where=f"stage {self.stage.name}, {which}",
                mend="mend the reward function, or raise rollout.max_unscorable",
            )

    def _look(self, rollouts: Rollouts) -> dict[str, list[np.ndarray]]:
        """Each answer's log-probabilities under the policy and the reference, its entropies, and values where the objective has them."""
        policy, needs = self.parts.policy, {"logprobs", "entropy", *({"values"} if self.shaping.values else ())}
        looked: list[dict[str, list[list[float]]]] = []
        for batch in mine([batch for part in self._parts(rollouts) for batch in part]):
            with torch.no_grad(), policy.deterministic():
                seen = policy(batch.forest, needs)
            found = {"old_S": seen.logprobs, "entropy_S": seen.entropy, "reference_S": self.parts.reference(batch.forest)}
            if seen.values is not None:
                found["old_value_S"] = seen.values
            cuts = np.flatnonzero(np.diff(batch.forest.row_S)) + 1
            rows = {name: np.split(values.float().cpu().numpy(), cuts) for name, values in found.items()}
            looked.append({name: [row.tolist() for row in values] for name, values in rows.items()})
        parts: dict[str, list[np.ndarray]] = {"old_S": [], "reference_S": [], "entropy_S": []}
        for seen in together(looked):
            for name, values in seen.items():
                parts.setdefault(name, []).extend(np.array(row, dtype=np.float32) for row in values)
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

    def _parts(self, rollouts: Rollouts) -> list[list[Batch]]:
        """The rollouts in as many parts of like size as a pass has updates, each in forward passes of the stage's batch size."""
        if rollouts.idle:
            return [[] for _ in range(self.shaping.parts)]
        unit, count = self.shaping.together, len(rollouts.ids)
        size = max(unit, self.stage.per_device_train_batch_size // unit * unit)
        cuts = [count // unit * k // self.shaping.parts * unit for k in range(self.shaping.parts)]
        cuts.append(count)  # one over is only among answers that are not chosen yet, and still looked at
        return [[self._batch(rollouts, range(a, min(a + size, end))) for a in range(begin, end, size)] for begin, end in pairwise(cuts)]

    def _batch(self, rollouts: Rollouts, rows: range) -> Batch:
        weighted = [(rollouts.ids[i], rollouts.weights(i)) for i in rows]
        _, item_B = np.unique(rollouts.items[rows.start : rows.stop], return_inverse=True)
        columns = {name: flat([values[i] for i in rows]) for name, values in rollouts.columns.items()}
        columns |= {name: values[rows.start : rows.stop] for name, values in rollouts.row_columns.items()}
        columns["max_new_tokens"] = np.array([self.stage.rollout.max_new_tokens])
        return Batch(build_forest(weighted), tuple(dict.fromkeys(rollouts.items[rows.start : rows.stop].tolist())), item_B, columns)


def steps_per_pass(stage: Stage, prompts: int) -> int:
    """Updates in one pass over the prompts."""
    return -(-prompts // stage.rollout.prompts_per_step) * Shaping.of(stage).updates


def _finished(answer: Answer) -> bool:
    return answer.generation.finish_reason == "stop"


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
    return found


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _plain(score: float) -> float | None:
    return float(score) if np.isfinite(score) else None
