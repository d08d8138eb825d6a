"""Windows of fixed data for objectives that compare: the reference's sums beside each row, kept on disk, KTO's estimate of the KL, and
updates that do not depend on how a window is cut into batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.toys import ItemsOf, Rows, loaded, make_items, make_stage, tiny_model
from tests.train.answers import make_policy

from tunesmith.data.batching import DatasetSource
from tunesmith.data.forest import build_forest
from tunesmith.models.heads import make_head
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy
from tunesmith.objectives import OBJECTIVES
from tunesmith.recipe import FullMethod
from tunesmith.train import offline
from tunesmith.train.offline import Mismatched, compares_with_reference, evaluate_rows, kept_sums, make_source, row_sums
from tunesmith.train.window import evaluate_loss, run_window

PAIRS, RANKINGS, LABELLED = make_items(11), make_items(7, answers=4), make_items(11, answers=1)
OBJECTIVES_ON = {
    "dpo": PAIRS,
    "dpo ipo": PAIRS,
    "simpo": PAIRS,
    "orpo": PAIRS,
    "cpo": PAIRS,
    "ranking": RANKINGS,
    "reward": RANKINGS,
    "kto": LABELLED,
}


def objective_of(name: str) -> dict:
    kind, *loss = name.split()
    return {"type": kind} | ({"loss": loss[0]} if loss else {}) | ({"sft_coef": 0.3} if kind == "dpo" else {})


def source_of(name: str, policy: Policy, folder: Path, *, size: int, accumulation: int, seed: int = 0, key: str = "key") -> DatasetSource:
    stage = make_stage(objective=objective_of(name), per_device_train_batch_size=size, rows=11)
    return make_source(stage, OBJECTIVES_ON[name], policy, seed=seed, accumulation=accumulation, folder=folder, key=key)


def policy_of(method: str = "lora") -> Policy:
    policy = make_policy() if method == "lora" else Policy(attach(loaded(tiny_model("llama")), FullMethod(), seed=0))
    policy.heads["score"] = make_head(32, seed=0)
    return policy


def moved(policy: Policy) -> Policy:
    """The policy some way from its start, so that log-ratios are not 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


def alone(policy: Policy, row) -> float:
    with torch.no_grad():
        return float(policy(build_forest([row])).logprobs.double().sum())


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", OBJECTIVES_ON)
def test_batch_size_and_accumulation_never_change_a_preference_update(tmp_path, name, method):
    stage = make_stage(objective=objective_of(name))
    objective, found = OBJECTIVES[stage.objective.type](stage.objective), {}
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        policy = policy_of(method)
        source = source_of(name, policy, tmp_path / f"{size}", size=size, accumulation=accumulation)
        moved(policy)
        for step in range(source.steps_per_epoch):  # the last window is smaller
            result = run_window(policy, objective, source.window(step).batches)
        gradient = torch.cat([p.grad.reshape(-1) for p in policy.parameters() if p.requires_grad and p.grad is not None])
        found[size] = (gradient, result)
    whole, result = found[8]
    assert whole.abs().max() > 1e-5
    for size in (4, 2, 1):
        gradient, other = found[size]
        assert (gradient - whole).abs().max() <= 1e-5 * max(1.0, float(whole.abs().max())), size
        assert other.loss == pytest.approx(result.loss, rel=1e-5)
        assert other.metrics == pytest.approx(result.metrics, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES_ON)
def test_the_held_out_loss_does_not_depend_on_the_batch_size(tmp_path, name):
    stage = make_stage(objective=objective_of(name))
    objective, losses = OBJECTIVES[stage.objective.type](stage.objective), []
    for size in (1, 3, 16):
        policy = policy_of()
        source = source_of(name, policy, tmp_path / str(size), size=size, accumulation=1)
        losses.append(evaluate_loss(moved(policy), objective, source.once()).loss)
    assert max(losses) - min(losses) <= 1e-5 * max(losses)


@pytest.mark.parametrize("name", ["dpo", "ranking", "kto"])
def test_every_row_carries_the_references_sum_of_its_own(tmp_path, name):
    policy = policy_of()
    want = {ids.tobytes(): alone(policy, (ids, weights)) for item in OBJECTIVES_ON[name] for ids, weights in item}
    source = source_of(name, policy, tmp_path, size=2, accumulation=2)
    moved(policy)
    rows = 0
    for step in range(2 * source.steps_per_epoch):
        for batch in source.window(step).batches:
            items = [row for i in batch.items for row in OBJECTIVES_ON[name][i]]
            np.testing.assert_allclose(batch.columns["reference_B"], [want[ids.tobytes()] for ids, _ in items], atol=1e-4)
            assert batch.item_B.tolist() == [place for place, i in enumerate(batch.items) for _ in OBJECTIVES_ON[name][i]]
            rows += len(items)
    assert rows == 2 * len(OBJECTIVES_ON[name].rows)


def test_only_objectives_that_compare_measure_a_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "row_sums", None)
    for name in ("simpo", "orpo", "cpo", "reward"):
        source = source_of(name, policy_of(), tmp_path / name, size=2, accumulation=1)
        assert "reference_B" not in source.window(0).batches[0].columns
        assert not (tmp_path / name).exists()
    stages = {name: make_stage(objective=objective_of(name)) for name in OBJECTIVES_ON} | {
        "none": make_stage(objective={"type": "dpo", "reference": "none"})
    }
    assert {name for name, stage in stages.items() if compares_with_reference(stage)} == {"dpo", "dpo ipo", "ranking", "kto"}


def test_sums_are_measured_once_and_again_where_they_are_of_something_else_or_damaged(tmp_path):
    asked = []

    def measure() -> dict[str, np.ndarray]:
        asked.append(len(asked))
        return {"reference_B": np.arange(3.0) + len(asked)}

    folder = tmp_path / "reference"
    for key, times in (("a", 1), ("a", 1), ("b", 2), ("b", 2), ("a", 3)):
        found = kept_sums(folder, key, measure)
        assert len(asked) == times
        np.testing.assert_array_equal(found["reference_B"], np.arange(3.0) + times)
    for name in (offline.SUMS, offline.KEY):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1])
        before = len(asked)
        assert kept_sums(folder, "a", measure)["reference_B"][0] == before + 1
    assert json.loads((folder / offline.KEY).read_text()) == "a"


def test_the_sums_of_rows_are_without_dropout_and_leave_no_gradient():
    policy = make_policy(lora_dropout=0.5)
    source = DatasetSource(PAIRS, batch_size=4, accumulation=1, seed=0)
    assert any(module.training for module in policy.modules())
    first, second = row_sums(policy, source.once()), row_sums(policy, source.once())
    np.testing.assert_array_equal(first, second)
    assert any(module.training for module in policy.modules())
    np.testing.assert_allclose(first, [alone(make_policy(), row) for row in PAIRS.rows], atol=1e-4)


def test_a_mismatched_row_is_a_prompt_with_the_next_items_answer():
    ids = [np.array([1, 2, 3, 4, 5]), np.array([9, 8, 7]), np.array([6, 6, 6, 6])]
    weights = [np.array([0, 0, 0.5, 0.5, 0]), np.array([0, 1, 1]), np.array([0, 0, 0, 1])]
    rows = [(i, w.astype(np.float32)) for i, w in zip(ids, weights, strict=True)]
    found = [Mismatched(ItemsOf([(row,) for row in rows], rows))[i][0] for i in range(3)]
    assert [row.tolist() for row, _ in found] == [[1, 2, 8, 7], [9, 6], [6, 6, 6, 3, 4]]
    assert [row.tolist() for _, row in found] == [[0, 0, 1, 1], [0, 1], [0, 0, 0, 0.5, 0.5]]


def test_a_mismatched_row_is_never_longer_than_the_longest_of_the_items(tmp_path):
    """A model with learned positions, GPT-2 here, has none for what lies beyond the longest row that the data may have."""
    limit = 128
    lengths = [(120, 8), (3, 125), (60, 60), (127, 1)]  # of prompt and answer: the first prompt meets the second answer
    rows = [(np.arange(asked + given) % 90 + 1, np.r_[np.zeros(asked), np.ones(given)].astype(np.float32)) for asked, given in lengths]
    items = ItemsOf([(row,) for row in rows], Rows(rows), {"label": np.array([True, False, True, False])})
    found = [Mismatched(items)[i][0] for i in range(4)]
    assert [(len(ids), int(weights.sum())) for ids, weights in found] == [(limit, 8), (63, 60), (61, 1), (limit, 1)]
    np.testing.assert_array_equal(found[0][0], np.r_[rows[0][0][:120], rows[1][0][3:11]])
    policy = Policy(attach(loaded(tiny_model("gpt2")), FullMethod(), seed=0))
    assert policy.causal.config.max_position_embeddings == limit
    stage = make_stage(objective="kto", rows=4)
    source = make_source(stage, items, policy, seed=0, accumulation=2, folder=tmp_path, key="key")
    assert [float(batch.columns["kto_z0"][0]) for batch in source.once()] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("name, passes", [("kto", 4 + 4), ("dpo", 4)])
def test_a_held_out_evaluation_can_be_interrupted_before_each_forward_pass(tmp_path, monkeypatch, name, passes):
    policy = policy_of()
    stage = make_stage(objective=objective_of(name))
    objective, source = OBJECTIVES[name](stage.objective), source_of(name, policy, tmp_path, size=3, accumulation=1)
    ran = []
    forward = policy.forward
    monkeypatch.setattr(policy, "forward", lambda *args, **kwargs: ran.append(1) or forward(*args, **kwargs))

    def stop_at(count: int):
        def between() -> None:
            if len(ran) == count:
                raise InterruptedError

        return between

    for count in range(passes):
        ran.clear()
        with pytest.raises(InterruptedError):
            evaluate_rows(policy, objective, source, stop_at(count))
        assert len(ran) == count
    want = evaluate_loss(policy, objective, source.once())
    assert evaluate_rows(policy, objective, source, lambda: None) == want


def test_ktos_estimate_is_the_mean_log_ratio_of_the_windows_mismatched_rows_cut_at_0(tmp_path):
    policy = policy_of()
    source = source_of("kto", policy, tmp_path, size=3, accumulation=2)
    rows = [Mismatched(LABELLED)[i][0] for i in range(len(LABELLED))]
    reference = np.array([alone(policy, row) for row in rows])
    assert [float(batch.columns["kto_z0"][0]) for batch in source.window(0).batches] == pytest.approx([0, 0], abs=1e-5)
    seen = []
    for direction in (1, -1):  # some way from the start, and the same way to the other side
        start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05 * direction)
        apart = np.array([alone(policy, row) for row in rows]) - reference
        for step in range(source.steps_per_epoch):
            batches = source.window(step).batches
            want = max(0.0, apart[[i for batch in batches for i in batch.items]].mean())
            for batch in batches:
                assert float(batch.columns["kto_z0"][0]) == pytest.approx(want, abs=1e-4)
                assert batch.columns["label_I"].tolist() == [i % 2 == 0 for i in batch.items]
            seen.append(want)
        assert float(next(iter(source.once())).columns["kto_z0"][0]) == pytest.approx(max(0.0, apart.mean()), abs=1e-4)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(start[name])
    assert min(seen) == 0 < max(seen)
