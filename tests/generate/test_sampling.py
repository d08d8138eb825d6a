"""The choice of tokens: greedy, the kept set of top-k and top-p, the draw, and the rows' random streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tunesmith.generate import GREEDY, Sampling, sampling, stream_seed
from tunesmith.generate.sampling import BLOCK, FIRST_NUCLEUS, choose_tokens, draw, kept_probabilities, row_seeds, row_stream


def plain_draw(probabilities, uniforms):
    """The first token at which one float64 cumulative sum over the vocabulary exceeds the uniform number."""
    mass = probabilities.double().cumsum(dim=-1)
    return torch.searchsorted(mass, torch.tensor(uniforms)[:, None] * mass[:, -1:], right=True).squeeze(-1).tolist()


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.3, top_p=0.6), Sampling(0.9, top_p=0.8, top_k=12)])
def test_kept_probabilities_equal_those_of_transformers_warpers(sampling):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p < 1:
        expected = TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(kept_probabilities(logits, sampling), expected.softmax(-1))


def test_a_nucleus_of_many_tokens_is_found_whole():
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(1)) * 0.3
    expected = TopPLogitsWarper(0.9)(None, logits.clone()).softmax(-1)
    assert (expected > 0).sum(dim=-1).min() > 2 * FIRST_NUCLEUS
    torch.testing.assert_close(kept_probabilities(logits, Sampling(1.0, top_p=0.9)), expected)


def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_uniform_number():
    logits = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25]]).log()
    uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 0.999999]
    drawn, _ = choose_tokens(logits.expand(6, -1), Sampling(temperature=1.0), uniforms)
    assert drawn == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("how", [Sampling(1.0), Sampling(0.7, top_k=300), Sampling(1.6, top_p=0.8)])
@pytest.mark.parametrize("vocabulary", [7, BLOCK, 3 * BLOCK + 41, 49152])
def test_draws_in_two_levels_equal_those_of_one_cumulative_sum(how, vocabulary, monkeypatch):
    monkeypatch.setattr(sampling, "CHOICE_ELEMENTS_CPU", 5 * vocabulary)  # the rows come in several parts
    logits = torch.randn(64, vocabulary, generator=torch.Generator().manual_seed(2)) * 3
    uniforms = np.random.default_rng(3).random(64).tolist()
    drawn, _ = choose_tokens(logits, how, uniforms)
    assert drawn == plain_draw(kept_probabilities(logits, how), uniforms)
    assert len(set(drawn)) > 3


def test_draws_over_more_than_one_block_follow_the_distribution():
    vocabulary, draws = BLOCK + 30, 60_000
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(4)) * 0.5
    uniforms = np.random.default_rng(5).random(draws).tolist()
    drawn, _ = choose_tokens(logits.expand(draws, -1), Sampling(0.8), uniforms)
    expected = (logits[0] / 0.8).softmax(-1).numpy() * draws
    chi_square = ((np.bincount(drawn, minlength=vocabulary) - expected) ** 2 / expected).sum()
    freedom = vocabulary - 1
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_a_token_of_probability_zero_is_never_drawn_not_even_at_the_ends():
    ends = [0.0, np.nextafter(1.0, 0.0)]
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    assert choose_tokens(logits.expand(2, -1), Sampling(temperature=1.0), ends)[0] == [1, 2]
    wide = torch.full((1, 4 * BLOCK), -torch.inf)
    wide[0, [BLOCK + 5, 2 * BLOCK + 9]] = torch.tensor([0.3, 0.1])
    assert choose_tokens(wide.expand(2, -1), Sampling(temperature=1.0), ends)[0] == [BLOCK + 5, 2 * BLOCK + 9]


def test_a_number_that_rounds_past_the_end_draws_the_last_token_with_any_weight():
    weights = torch.zeros(1, 3 * BLOCK)
    weights[0, [3, BLOCK + 7]] = torch.tensor([0.1, 0.7])
    assert draw(weights, torch.tensor([[1.0]], dtype=torch.float64)).tolist() == [BLOCK + 7]


def test_temperature_zero_takes_the_greatest_logit_and_draws_nothing():
    assert choose_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), GREEDY, None) == ([1, 0], None)


@pytest.mark.parametrize("how", [GREEDY, Sampling(1.0), Sampling(0.6), Sampling(1.7, top_k=4), Sampling(1.2, top_p=0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_those_of_the_whole_softmax_whatever_top_k_and_top_p_leave_out(how, dtype):
    logits = (torch.randn(40, 700, generator=torch.Generator().manual_seed(6)) * 4).to(dtype)
    given = logits.clone()
    tokens, logprobs = choose_tokens(logits, how, np.random.default_rng(7).random(40).tolist(), logprobs=True)
    expected = (logits.double() / (how.temperature or 1.0)).log_softmax(-1)[range(40), tokens]
    np.testing.assert_allclose(logprobs, expected.numpy(), atol=3e-6)
    assert torch.equal(logits, given)


def test_a_rows_seed_depends_on_the_samplings_seed_the_prompt_and_its_occurrence_alone():
    first = row_seeds([[1], [2], [1]], seed=0)
    other_order = row_seeds([[9], [1], [1], [2]], seed=0)
    assert first == [other_order[1], other_order[3], other_order[2]]
    assert len(set(first)) == 3
    assert first[0] != row_seeds([[1]], seed=1)[0]


def test_a_seed_is_made_of_its_parts_in_their_order_and_names_one_stream():
    seeds = [stream_seed(*parts) for parts in ([1, 23], [12, 3], [23, 1], ["1", 23, 0], [1, 23, 1])]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_stream(seeds[0]).random() == row_stream(stream_seed(1, 23)).random() != row_stream(seeds[1]).random()
    assert 0 <= row_stream(-5).random() < 1
