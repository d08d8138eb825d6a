"""Rollouts in a checkpoint: back bit for bit, with the batches that were made of them, and without sampling again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.train.answers import make_policy, make_source, objective_of

from tunesmith.train.buffer import PREFIX, Rollouts

KINDS = {
    "ppo": objective_of("ppo", target_kl=0.5, num_mini_batches=2),
    "grpo": objective_of("grpo", num_iterations=2),
    "rloo": objective_of("rloo", num_iterations=2),
    "online_dpo": objective_of("online_dpo"),
    "best_of_n": objective_of("best_of_n"),
}


def no_sampler(*args, **kwargs):
    raise AssertionError("sampled again")


def through_a_file(state: dict[str, torch.Tensor], path) -> dict[str, torch.Tensor]:
    save_file(state, path)
    return load_file(path)


def same_batches(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.items == other.items
        np.testing.assert_array_equal(mine.item_B, other.item_B)
        np.testing.assert_array_equal(mine.forest.tokens_T, other.forest.tokens_T)
        np.testing.assert_array_equal(mine.forest.weight_S, other.forest.weight_S)
        assert mine.columns.keys() == other.columns.keys()
        for name, values in mine.columns.items():
            np.testing.assert_array_equal(values, other.columns[name])
            assert np.asarray(values).dtype == np.asarray(other.columns[name]).dtype, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_of_an_iteration_is_the_same_from_a_checkpoint_and_nothing_is_sampled_for_it(tmp_path, kind):
    source = make_source(KINDS[kind])
    source.window(0)
    state = through_a_file(source.state(), tmp_path / "state.safetensors")
    again = make_source(KINDS[kind], sampler=no_sampler)
    again.load(state)
    for step in range(source.updates):
        ours, theirs = source.window(step), again.window(step)
        assert ours.metrics == theirs.metrics
        same_batches(ours.batches, theirs.batches)
    with pytest.raises(AssertionError, match="sampled again"):
        again.window(source.updates)
    assert again.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state().items())


def test_what_later_iterations_compare_with_comes_back_too(tmp_path):
    source = make_source(KINDS["ppo"], policy=make_policy(changed=0.3))
    source.window(0)
    coefficient, first = source.shaping.kl_coef, source.baseline.first
    assert first.keys() == {"length", "distinct"}
    assert coefficient != source.stage.objective.kl_coef
    again = make_source(KINDS["ppo"], policy=make_policy(changed=0.3))
    again.load(through_a_file(source.state(), tmp_path / "state.safetensors"))
    assert (again.shaping.kl_coef, again.baseline.first) == (coefficient, first)
    ours, theirs = source.window(source.updates), again.window(source.updates)
    assert ours.metrics == theirs.metrics
    assert ours.metrics["kl_coef"] == coefficient
    same_batches(ours.batches, theirs.batches)


def test_a_state_without_rollouts_gives_none():
    source = make_source()
    assert not [name for name in source.state() if name.startswith(PREFIX)]
    source.load({})
    assert source.rollouts is None
    assert Rollouts.load({}, lambda rollouts: []) is None


@pytest.mark.parametrize("kind", ["online_dpo", "grpo"])  # of no row, and of rows that teach nothing
def test_rollouts_that_teach_nothing_come_back_as_such(tmp_path, kind):
    source = make_source(KINDS[kind], reward=lambda answers: [0.0] * len(answers))
    assert source.window(0).batches == []
    again = make_source(KINDS[kind], sampler=no_sampler)
    again.load(through_a_file(source.state(), tmp_path / "state.safetensors"))
    assert [again.window(step).batches for step in range(source.updates)] == [[]] * source.updates


def test_words_among_the_metrics_come_back_too(tmp_path):
    source = make_source(reward=lambda answers: [float("nan"), *(float(i) for i in range(1, len(answers)))])
    source.window(0)
    again = make_source(sampler=no_sampler)
    again.load(through_a_file(source.state(), tmp_path / "state.safetensors"))
    assert again.window(0).metrics["unscorable_because"] == "it broke"


def test_only_the_answers_tokens_carry_loss():
    source = make_source()
    source.window(0)
    rollouts = source.rollouts
    for row, ids in enumerate(rollouts.ids):
        weights, prompt = rollouts.weights(row), rollouts.prompt_lengths[row]
        assert not weights[:prompt].any()
        assert weights[prompt:].all()
        assert len(weights) == len(ids)
        assert len(rollouts.columns["old_S"][row]) == len(ids) - prompt
