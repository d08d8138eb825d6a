"""What rollouts ask of generation: the sampled tokens' log-probabilities, seeds, groups of one prompt, a policy in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.families import FAMILIES, tiny_model
from tests.generate.helpers import generator, plain_logits, prompts_with_prefix, reference_logprobs, tokens_of
from tunesmith.data.forest import build_forest
from tunesmith.generate import GREEDY, Sampling, choice_constraint, engine, stream_seed
from tunesmith.generate.engine import Engine
from tunesmith.models.attention import FOREST
from tunesmith.models.policy import Policy

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def group_of(prompts, samples=4):
    """Each prompt several times, in turns, so that no two equal ones are neighbours."""
    return list(prompts) * samples


def unshared(monkeypatch):
    """Lets the engine hold every row for a prompt of its own."""

    def run(self, rows, P, prefix, sampling, stop_ids):
        for row in rows:
            real(self, [row], P, prefix, sampling, stop_ids)

    real = Engine._generate_batch
    monkeypatch.setattr(Engine, "_generate_batch", run)


@pytest.mark.parametrize("way", ["engine", "fallback"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=3), Sampling(0.5, seed=4), Sampling(1.4, top_p=0.7, top_k=20, seed=5)])
def test_sampled_log_probabilities_are_the_models_own_at_the_temperature(sampling, way):
    model, prompts = tiny_model("llama"), prompts_with_prefix(5)
    ours = generator(model, batch_size=3)
    if way == "fallback":
        ours._checked = True  # without an engine
    for prompt, generation in zip(prompts, ours.generate(prompts, max_new_tokens=7, sampling=sampling, logprobs=True), strict=True):
        ids = prompt + generation.token_ids
        logits = plain_logits(model, ids)[len(prompt) - 1 : -1] / (sampling.temperature or 1.0)
        expected = logits.log_softmax(-1)[range(len(generation.token_ids)), generation.token_ids]
        np.testing.assert_allclose(generation.logprobs, expected.numpy(), atol=1e-5)


def test_log_probabilities_are_given_only_where_asked_for_and_change_no_token():
    model, prompts, sampling = tiny_model("qwen3"), prompts_with_prefix(4), Sampling(1.0, seed=1)
    silent = generator(model).generate(prompts, max_new_tokens=6, sampling=sampling)
    asked = generator(model).generate(prompts, max_new_tokens=6, sampling=sampling, logprobs=True)
    assert [generation.logprobs for generation in silent] == [None] * 4
    assert tokens_of(silent) == tokens_of(asked)
    assert [len(generation.logprobs) for generation in asked] == [len(generation.token_ids) for generation in asked]


def test_log_probabilities_under_a_constraint_count_the_tokens_that_it_forbids(random_llama, smollm2_tokenizer):
    constraint = choice_constraint(["refund", "card lost"], smollm2_tokenizer)
    prompt = smollm2_tokenizer("what is it?").input_ids
    for sampling in (GREEDY, Sampling(1.0), Sampling(0.8, top_k=3)):
        (generation,) = generator(random_llama).generate(
            [prompt], max_new_tokens=9, sampling=sampling, constraint=constraint, logprobs=True
        )
        logits = plain_logits(random_llama, prompt + generation.token_ids)[len(prompt) - 1 : -1] / (sampling.temperature or 1.0)
        expected = logits.log_softmax(-1)[range(len(generation.token_ids)), generation.token_ids].numpy()
        np.testing.assert_allclose(generation.logprobs, expected, atol=1e-4)
        assert expected.min() < -2  # what it chose among was not likely


def test_a_seed_of_its_own_decides_a_rows_stream_whatever_else_runs():
    model, prompts = tiny_model("llama"), prompts_with_prefix(6)
    seeds = [stream_seed(7, 0, number, 0) for number in range(6)]
    together = tokens_of(generator(model).generate(prompts, max_new_tokens=8, sampling=Sampling(1.3, seed=1), seeds=seeds))
    ours = generator(model, batch_size=2)
    order = [4, 1, 5, 0]
    some = ours.generate([prompts[i] for i in order], max_new_tokens=8, sampling=Sampling(1.3, seed=2), seeds=[seeds[i] for i in order])
    assert tokens_of(some) == [together[i] for i in order]
    twice = tokens_of(ours.generate([prompts[0]] * 3, max_new_tokens=8, sampling=Sampling(1.3), seeds=[seeds[0], seeds[0], seeds[1]]))
    assert twice[0] == twice[1] == together[0] != twice[2]
    with pytest.raises(ValueError, match="2 prompts, 1 seeds"):
        ours.generate([[1], [2]], max_new_tokens=1, seeds=[5])


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_of_one_prompt_say_what_their_samples_say_one_by_one(family, monkeypatch):
    model, sampling = tiny_model(family), Sampling(1.0, seed=9)
    prompts = group_of(prompts_with_prefix(3)) + prompts_with_prefix(4, seed=5)
    shared = generator(model, batch_size=9).generate(prompts, max_new_tokens=9, sampling=sampling, logprobs=True)
    unshared(monkeypatch)
    alone = generator(model, batch_size=9).generate(prompts, max_new_tokens=9, sampling=sampling, logprobs=True)
    assert tokens_of(shared) == tokens_of(alone)
    for one, other in zip(shared, alone, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_a_prompt_that_comes_several_times_is_computed_once():
    model, prompts = tiny_model("llama"), prompts_with_prefix(3, prefix=20)
    ours = generator(model, batch_size=8)
    ours.generate(prompts[:1], max_new_tokens=1)  # the check of the fast way is done
    seen = []
    hook = model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    ours.generate(group_of(prompts), max_new_tokens=1, sampling=Sampling(1.0))  # in two batches
    hook.remove()
    assert sum(seen) == 20 + sum(len(prompt) - 20 for prompt in prompts)


def test_a_group_stays_in_one_batch_where_it_fits():
    assert list(engine.batches([5] * 6, 4, alike="abcabc")) == [[0, 3, 1, 4], [2, 5]]
    assert list(engine.batches([5] * 7, 3, alike="aaaaabb")) == [[0, 1, 2], [3, 4], [5, 6]]
    assert list(engine.batches([3, 9, 3, 9], 50, alike="abab")) == [[1, 3, 0, 2]]


@pytest.mark.parametrize("fast", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_a_policy_in_training_says_what_its_weights_of_now_say(fast, checkpointing):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.3 if not fast else 0.0))
    policy = Policy(model, fast=fast, gradient_checkpointing=checkpointing)
    assert bool(policy.fast_paths.used.get("lora")) == fast
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.05)
    prompts = prompts_with_prefix(5)
    ours, said = generator(policy.model), []
    modes = [module.training for module in policy.model.modules()]
    for _ in range(3):
        generations = ours.generate(prompts, max_new_tokens=8, logprobs=True)
        assert tokens_of(generations) == tokens_of(generator(policy.model).generate(prompts, max_new_tokens=8))
        assert policy.causal.config._attn_implementation == FOREST
        assert [module.training for module in policy.model.modules()] == modes
        forest = build_forest([row_of(prompt, generation.token_ids) for prompt, generation in zip(prompts, generations, strict=True)])
        with policy.deterministic(), torch.no_grad():
            trainers = policy(forest).logprobs.numpy()
        np.testing.assert_allclose(np.concatenate([generation.logprobs for generation in generations]), trainers, atol=5e-5)
        said.append(tokens_of(generations))
        (-policy(forest).logprobs[:7].sum()).neg().backward()  # away from what it said
        optimiser.step()
        optimiser.zero_grad()
    assert said[0] != said[1] != said[2]


def row_of(prompt, answer):
    """A row of the store: token ids, and weights that supervise the answer."""
    return np.array(prompt + answer), np.array([0.0] * len(prompt) + [1.0] * len(answer), dtype=np.float32)


def test_the_check_against_the_plain_model_runs_once_a_generator(monkeypatch):
    checks = []
    difference = Engine.difference
    monkeypatch.setattr(Engine, "difference", lambda self, *given: checks.append(1) or difference(self, *given))
    ours = generator(tiny_model("llama"))
    for seed in range(3):
        ours.generate(prompts_with_prefix(2, seed=seed), max_new_tokens=2)
        ours.logprobs([[1, 2, 3]], [[4]])
    assert checks == [1]


def test_scores_of_sampled_answers_agree_with_their_sampled_log_probabilities():
    model, prompts = tiny_model("gemma2"), group_of(prompts_with_prefix(2))
    ours = generator(model)
    generations = ours.generate(prompts, max_new_tokens=5, sampling=Sampling(1.0), logprobs=True)
    for prompt, generation in zip(prompts, generations, strict=True):
        np.testing.assert_allclose(generation.logprobs, reference_logprobs(model, prompt, generation.token_ids), atol=1e-5)
