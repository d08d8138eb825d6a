"""Perplexity against a hand-computed one, whatever the batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.generate.helpers import NumberTokenizer, plain_logits, prompts_with_prefix
from tunesmith.errors import NonFinite, TunesmithError
from tunesmith.evaluate.perplexity import reference_nats
from tunesmith.generate import LocalGenerator
from tunesmith.score import bootstrap_interval

VOCABULARY, BOS = 97, 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=BOS,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def pairs():
    prompts = prompts_with_prefix(9, vocabulary=VOCABULARY, seed=1)
    rng = np.random.default_rng(2)
    return prompts, [rng.integers(1, VOCABULARY, rng.integers(1, 12)).tolist() for _ in prompts]


def by_hand(model, prompt, answer):
    """The sum of -log p(token | all before it) over the answer, by one plain forward in float64."""
    logits = plain_logits(model, [*prompt, *answer]).double()
    return -sum(float(logits[len(prompt) + i - 1].log_softmax(-1)[token]) for i, token in enumerate(answer))


def test_perplexity_equals_the_hand_computed_one_and_sees_neither_a_missing_bos_nor_a_second_one(model, pairs):
    prompts, answers = pairs
    found = reference_nats(LocalGenerator(model, NumberTokenizer(0)), prompts, answers)
    nats = [by_hand(model, *pair) for pair in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    assert found.tokens == tuple(map(len, answers))
    value = bootstrap_interval(found.statistic).value
    assert value == pytest.approx(math.exp(sum(nats) / sum(map(len, answers))), rel=1e-5)
    with_bos = reference_nats(LocalGenerator(model, NumberTokenizer(0)), [[BOS, *prompt] for prompt in prompts], answers)
    assert abs(bootstrap_interval(with_bos.statistic).value / value - 1) > 1e-4


def test_perplexity_is_the_same_for_every_batch_size(model, pairs):
    found = [
        bootstrap_interval(reference_nats(LocalGenerator(model, NumberTokenizer(0), batch_size=size), *pairs).statistic).value
        for size in (1, 2, 3, 8)
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def test_each_token_counts_once_and_not_each_item(model, pairs):
    found = reference_nats(LocalGenerator(model, NumberTokenizer(0)), *pairs)
    by_item = np.mean([math.exp(nats / tokens) for nats, tokens in zip(found.nats, found.tokens, strict=True)])
    assert abs(bootstrap_interval(found.statistic).value - by_item) > 1e-3


class Returns:
    """A generator whose log-probabilities are given."""

    def __init__(self, rows):
        self.rows = rows

    def logprobs(self, prompts, answers):
        return self.rows


def test_a_log_probability_that_is_not_finite_is_an_error_and_no_score():
    rows = [np.array([-1.0]), np.array([-1.0, -np.inf])]
    with pytest.raises(NonFinite, match="item 1"):
        reference_nats(Returns(rows), [[1], [1]], [[2], [3, 4]])


def test_a_generator_that_skips_a_token_or_a_row_is_an_error_and_no_score():
    with pytest.raises(TunesmithError, match="every token"):
        reference_nats(Returns([np.array([-1.0])]), [[1]], [[2, 3]])
    with pytest.raises(TunesmithError, match="every token"):
        reference_nats(Returns([np.array([-1.0])]), [[1], [1]], [[2], [3]])


def test_an_empty_answer_is_refused():
    with pytest.raises(ValueError, match="empty answer"):
        reference_nats(Returns([]), [[1]], [[]])
