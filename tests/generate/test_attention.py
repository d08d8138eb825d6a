"""The attention function by itself: what it refuses, what its mask is, which keys a query sees."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from tests.families import tiny_model
from tunesmith.errors import ModelError
from tunesmith.generate.attention import NAME, attending, attention_implementation, hidden_keys, shared_prefix_attention, window_mask
from tunesmith.generate.cache import PrefixCache


def call(**extra):
    cache = PrefixCache(1, [3, 2])
    query = torch.zeros(1, 2, 5, 4)
    cache.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), 0)
    with attending(cache):
        return shared_prefix_attention(torch.nn.Identity(), query, query, query, None, **extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1)},
        {"dropout": 0.1},
        {"is_causal": False},
        {"output_attentions": True},
        {"something_new": 1},
    ],
)
def test_an_argument_that_changes_attention_and_is_not_known_is_refused_by_name(extra):
    with pytest.raises(ModelError, match=next(iter(extra))):
        call(**extra)


def test_harmless_arguments_are_accepted():
    attended, weights = call(position_ids=torch.zeros(1, 5), output_attentions=False, s_aux=None, dropout=0.0, is_causal=True)
    assert attended.shape == (1, 5, 2, 4)
    assert weights is None


def test_a_window_on_which_layer_and_mask_disagree_is_refused():
    cache = PrefixCache(1, [3])
    query = torch.zeros(1, 2, 3, 4)
    cache.update(query[:, :1], query[:, :1], 0)
    with attending(cache), pytest.raises(ModelError, match="sliding window 5, its mask 7"):
        shared_prefix_attention(torch.nn.Identity(), query, query, query, torch.tensor([7]), sliding_window=5)


def test_called_outside_generation_it_says_so():
    with attention_implementation(model := tiny_model("llama"), NAME), pytest.raises(ModelError, match="outside of generation"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_mask_is_one_number_and_never_a_square():
    model = tiny_model("mistral")
    with attention_implementation(model, NAME):
        embeds, cache = torch.zeros(2, 50, 32), PrefixCache(2, [50, 50])
        assert create_causal_mask(model.config, embeds, None, cache).tolist() == [0]
        assert create_sliding_window_causal_mask(model.config, embeds, None, cache).tolist() == [9]


def test_a_mask_that_is_not_plainly_causal_is_refused():
    for unknown in ({"use_vmap": True}, {"attention_mask": torch.ones(1, 3)}, {"allow_is_bidirectional_skip": True}):
        with pytest.raises(ModelError, match="not a plain causal"):
            window_mask(**unknown)


@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("window", [0, 1, 4, 9])
@pytest.mark.parametrize("prefix", [0, 5])
def test_a_query_sees_the_prefix_and_its_own_row_up_to_itself_within_the_window(window, prefix, beyond):
    lengths = [6, 4, 1]
    keys = torch.zeros(1, prefix, 1)
    cache = PrefixCache(1, lengths, prefix=[(keys, keys)] if prefix else None)
    (block,) = cache.layout.blocks(heads=1)
    hidden = hidden_keys(cache.layout.start_B, prefix, block, window, block.first_query + block.queries + beyond)
    for row, length in enumerate(lengths):
        for token in range(length):
            seen = ~hidden[row, 6 - length + token] if hidden is not None else torch.ones(prefix + 6, dtype=torch.bool)
            mine = torch.cat((seen[:prefix], seen[prefix + 6 - length : prefix + 6]))
            position = prefix + token
            expected = [key <= position and not (window and position - key >= window) for key in range(prefix + length)]
            assert mine.tolist() == expected
            assert not seen[prefix : prefix + 6 - length].any()
            assert not seen[prefix + 6 :].any()


def test_blocks_cover_every_token_once_and_stay_under_the_limit(monkeypatch):
    from tunesmith.generate import cache as module

    monkeypatch.setattr(module, "SCORE_ELEMENTS_CPU", 200)
    lengths = [40, 7, 7, 6, 3, 3, 2, 1, 1]
    layout = PrefixCache(1, lengths, prefix=[(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1))]).layout
    blocks = layout.blocks(heads=1)
    assert [token for block in blocks for token in range(block.tokens.start, block.tokens.stop)] == list(range(sum(lengths)))
    for block in blocks:
        rows = block.rows.stop - block.rows.start
        assert rows * block.queries * (4 + block.first_query + block.queries - block.first_key) <= 200
