"""The loop is not shaped by SFT: objectives of two terms with their own divisors, of rows and of values, through the same window and
loop; and however a window is cut into batches, the update is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests.toys import batch_of, items_of, loaded, make_job, make_rows, make_stage, tiny_model
from torch import nn

from tunesmith.data.batching import Batch, DatasetSource
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy, TokenOutputs
from tunesmith.objectives import SFT, Term
from tunesmith.recipe import LoraMethod
from tunesmith.rundir import RunDirectory
from tunesmith.train.loop import train
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.window import evaluate_loss, run_window

ROWS = make_rows(11)


class LikelihoodAndLength:
    """Cross-entropy over supervised tokens, and 0.3 times the squared log-likelihood / 10 of each row of eight tokens or more."""

    needs = frozenset({"logprobs", "entropy"})

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        return {"tokens": float(len(batch.forest.target_S)), "rows": float(self._long(batch).sum())}

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        row_S = torch.from_numpy(batch.forest.row_S)
        sums_B = torch.zeros(len(batch.forest.lengths_B)).index_add(0, row_S, outputs.logprobs)
        chosen = torch.from_numpy(self._long(batch))
        return {"tokens": Term(-outputs.logprobs.sum()), "rows": Term((sums_B[chosen] / 10).square().sum(), 0.3)}

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        return {"entropy": (float(outputs.entropy.sum()), len(outputs.entropy))}

    def _long(self, batch: Batch) -> np.ndarray:
        return batch.forest.lengths_B >= 8


class ValueOfPosition:
    """Values towards 1 at every supervised token, over tokens; scores towards the row's length / 10, over rows."""

    needs = frozenset({"values", "scores"})

    def divisors(self, batch: Batch) -> Mapping[str, float]:
        return {"values": float(len(batch.forest.target_S)), "scores": float(len(batch.forest.lengths_B))}

    def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
        want = torch.from_numpy(batch.forest.lengths_B) / 10
        return {"values": Term((outputs.values - 1).square().sum()), "scores": Term((outputs.scores - want).square().sum(), 0.5)}

    def metrics(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, tuple[float, float]]:
        return {}


OBJECTIVES = {"sft": SFT, "two terms": LikelihoodAndLength}


def updated(objective: Any, *, batch_size: int, accumulation: int, rows: Any = ROWS, method: str = "full") -> torch.Tensor:
    """All trained weights after two updates on windows of the same rows, minus where they began."""
    model = tiny_model("llama")
    stage = make_stage(warmup_steps=0, lr_scheduler_type="constant", per_device_train_batch_size=batch_size, learning_rate=1e-3)
    policy = Policy(attach(loaded(model), LoraMethod(r=4), seed=0) if method == "lora" else model)
    optimiser = Optimiser(policy.named_parameters(), stage.model_copy(update={"adam_epsilon": 1e-3}))
    began = optimiser.flat.clone()
    source = DatasetSource(items_of(rows), batch_size=batch_size, accumulation=accumulation, seed=0)
    for step in range(2):
        optimiser.zero_grad()
        run_window(policy, objective, source.window(step).batches)
        optimiser.step(1e-2, optimiser.grad_norm())
    return optimiser.flat - began


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batch_and_accumulation_never_change_the_update_ragged_tail_included(name, method):
    whole = updated(OBJECTIVES[name](), batch_size=8, accumulation=1, method=method)
    assert whole.abs().max() > 1e-4
    for batch_size, accumulation in ((4, 2), (2, 4), (1, 8)):
        other = updated(OBJECTIVES[name](), batch_size=batch_size, accumulation=accumulation, method=method)
        assert (other - whole).abs().max() <= 1e-6, (batch_size, accumulation)


def test_dividing_in_each_batch_would_change_the_update():
    class DividedTooEarly(LikelihoodAndLength):
        def divisors(self, batch: Batch) -> Mapping[str, float]:
            return {"tokens": 1.0, "rows": 1.0}

        def terms(self, outputs: TokenOutputs, batch: Batch) -> Mapping[str, Term]:
            divisors = super().divisors(batch)
            return {k: t._replace(sum=t.sum / max(divisors[k], 1)) for k, t in super().terms(outputs, batch).items()}

    whole = updated(DividedTooEarly(), batch_size=8, accumulation=1)
    assert (updated(DividedTooEarly(), batch_size=2, accumulation=4) - whole).abs().max() > 1e-5


def test_each_term_is_divided_by_its_own_divisor_of_the_whole_window():
    policy, objective = Policy(tiny_model("llama")), LikelihoodAndLength()
    batches = [batch_of(ROWS[:3]), batch_of(ROWS[3:7])]
    with torch.no_grad():
        sums = {"tokens": 0.0, "rows": 0.0}
        for batch in batches:
            for name, term in objective.terms(policy(batch.forest, objective.needs), batch).items():
                sums[name] += float(term.sum)
    tokens = sum(int(np.count_nonzero(w)) for _, w in ROWS[:7])
    long = sum(len(ids) >= 8 for ids, _ in ROWS[:7])
    assert 0 < long < 7
    result = run_window(policy, objective, batches, backward=None)
    assert result.terms == pytest.approx({"tokens": sums["tokens"] / tokens, "rows": sums["rows"] / long}, rel=1e-6)
    assert result.loss == pytest.approx(sums["tokens"] / tokens + 0.3 * sums["rows"] / long, rel=1e-6)


def test_a_term_that_nothing_in_the_window_belongs_to_gives_nothing_and_no_nan():
    short = [(ids[:5], weights[:5]) for ids, weights in ROWS[:3]]
    policy = Policy(tiny_model("llama"))
    result = run_window(policy, LikelihoodAndLength(), [batch_of(short)])
    assert list(result.terms) == ["tokens"]
    assert np.isfinite(result.loss)
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_the_loop_trains_two_terms_and_logs_each_with_the_metrics(tmp_path):
    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=8), seed=0))
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        train(
            make_job(
                policy,
                make_stage(max_steps=30, learning_rate=2e-2, per_device_train_batch_size=6),
                run,
                ROWS,
                objective=LikelihoodAndLength(),
                validation=ROWS[:4],
            )
        )
        steps = [event for event in run.events() if "loss" in event]
        evaluated = [event for event in run.events() if event.get("event") == "evaluated"]
    first, last = steps[0], steps[-1]
    for name in ("loss", "loss/tokens", "loss/rows", "entropy"):
        assert last[name] < first[name]
    assert last["loss"] == pytest.approx(last["loss/tokens"] + 0.3 * last["loss/rows"], rel=1e-5)
    assert "eval_entropy" in evaluated[0]


def test_value_and_score_heads_train_through_the_same_loop(tmp_path):
    policy = Policy(attach(loaded(tiny_model("llama")), LoraMethod(r=4), seed=0), detach_values=False)
    torch.manual_seed(0)
    policy.heads["value"], policy.heads["score"] = nn.Linear(32, 1), nn.Linear(32, 1)
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        job = make_job(policy, make_stage(max_steps=40, learning_rate=2e-2), run, ROWS, objective=ValueOfPosition())
        assert {"heads.value.weight", "heads.score.bias"} <= set(job.optimiser.names)
        before = evaluate_loss(policy, job.objective, [batch_of(ROWS)])
        train(job)
        after = evaluate_loss(policy, job.objective, [batch_of(ROWS)])
    for name in ("values", "scores"):
        assert after.terms[name] < before.terms[name] / 10


def test_values_and_scores_are_read_at_each_tokens_source_and_each_rows_last_token():
    policy = Policy(tiny_model("llama"))
    policy.heads["value"], policy.heads["score"] = nn.Linear(32, 1), nn.Linear(32, 1)
    together = policy(batch_of(ROWS[:4]).forest, {"values", "scores"})
    alone = [policy(batch_of([row]).forest, {"values", "scores"}) for row in ROWS[:4]]
    torch.testing.assert_close(together.values, torch.cat([a.values for a in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.scores, torch.cat([a.scores for a in alone]), rtol=1e-4, atol=1e-5)
    ids = torch.from_numpy(ROWS[2][0])[None]
    states = tiny_model("llama").model(input_ids=ids, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(together.scores[2], policy.heads["score"](states[-1])[0], rtol=1e-4, atol=1e-5)
    supervised = np.nonzero(ROWS[2][1])[0]
    want = policy.heads["value"](states[supervised - 1])[:, 0]
    torch.testing.assert_close(alone[2].values, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_validation_loss_does_not_depend_on_the_batch_size(name):
    policy = Policy(tiny_model("llama"))
    losses = [
        evaluate_loss(policy, OBJECTIVES[name](), DatasetSource(items_of(ROWS), batch_size=n, accumulation=1, seed=0).once()).loss
        for n in (1, 2, 3, 8)
    ]
    assert max(losses) - min(losses) <= 1e-6 * max(losses)


def test_every_row_is_trained_on_once_an_epoch_in_an_order_of_the_seed_alone():
    for batch_size, accumulation in ((1, 1), (2, 3), (4, 2), (16, 1)):
        source = DatasetSource(items_of(ROWS), batch_size=batch_size, accumulation=accumulation, seed=3)
        epochs = []
        for epoch in range(2):
            steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
            epochs.append([i for step in steps for batch in source.window(step).batches for i in batch.items])
            assert sorted(epochs[-1]) == list(range(len(ROWS)))
        assert epochs[0] != epochs[1]
        again = DatasetSource(items_of(ROWS), batch_size=batch_size, accumulation=accumulation, seed=3)
        last = source.steps_per_epoch - 1
        assert [b.items for b in again.window(last).batches] == [b.items for b in source.window(last).batches]
