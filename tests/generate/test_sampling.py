"""The choice of tokens: greedy, the kept set of top-k and top-p, the draw, and the rows' random streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tunesmith.generate import GREEDY, Sampling
from tunesmith.generate.sampling import FIRST_NUCLEUS, choose_tokens, kept_probabilities, row_streams


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
    drawn = choose_tokens(logits.expand(6, -1), Sampling(temperature=1.0), uniforms)
    assert drawn == [1, 1, 3, 3, 4, 4]


def test_a_token_of_probability_zero_is_never_drawn_not_even_at_the_ends():
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    assert choose_tokens(logits.expand(2, -1), Sampling(temperature=1.0), [0.0, np.nextafter(1.0, 0.0)]) == [1, 2]


def test_temperature_zero_takes_the_greatest_logit_and_draws_nothing():
    assert choose_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), GREEDY, None) == [1, 0]


def test_a_rows_stream_depends_on_seed_prompt_and_occurrence_alone():
    first = [stream.random() for stream in row_streams([[1], [2], [1]], seed=0)]
    other_order = [stream.random() for stream in row_streams([[9], [1], [1], [2]], seed=0)]
    assert first == [other_order[1], other_order[3], other_order[2]]
    assert len(set(first)) == 3
    assert first[0] != row_streams([[1]], seed=1)[0].random()
