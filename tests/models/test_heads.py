"""Heads: what is saved is what is loaded, and what is missing or of another width is an error and never a fresh head."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith.errors import AdapterError
from tunesmith.models import heads as module
from tunesmith.models.heads import HEADS, load_head, make_head, save_heads


def test_a_head_comes_back_bit_for_bit_and_frozen(tmp_path):
    heads = nn.ModuleDict({"score": make_head(8, seed=1), "value": make_head(8, seed=2)})
    save_heads(heads, tmp_path)
    for name, head in heads.items():
        again = load_head(tmp_path, name, 8)
        assert torch.equal(again.weight, head.weight)
        assert again.bias is None
        assert not again.weight.requires_grad
    assert not torch.equal(heads["score"].weight, heads["value"].weight)


def test_a_start_is_a_function_of_its_seed_and_without_one_zero():
    assert torch.equal(make_head(64, seed=3).weight, make_head(64, seed=3).weight)
    assert not torch.equal(make_head(64, seed=3).weight, make_head(64, seed=4).weight)
    assert not make_head(64, seed=None).weight.any()
    assert make_head(10_000, seed=0).weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_a_result_without_heads_gets_no_file_of_them(tmp_path):
    save_heads(nn.ModuleDict(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("held", [None, "value"])
def test_a_missing_head_is_an_error(tmp_path, held):
    if held:
        save_heads(nn.ModuleDict({held: make_head(8, seed=1)}), tmp_path)
    with pytest.raises(AdapterError, match="there is no `score` head"):
        load_head(tmp_path, "score", 8)


def test_a_head_of_another_width_and_a_damaged_file_are_errors(tmp_path):
    save_heads(nn.ModuleDict({"score": make_head(8, seed=1)}), tmp_path)
    with pytest.raises(AdapterError, match=r"of shape \(1, 8\), the model needs \(1, 9\)"):
        load_head(tmp_path, "score", 9)
    (tmp_path / HEADS).write_bytes((tmp_path / HEADS).read_bytes()[:-3])
    with pytest.raises(AdapterError, match="cannot be read"):
        load_head(tmp_path, "score", 8)


def test_a_file_that_does_not_read_back_as_what_is_held_is_an_error(tmp_path, monkeypatch):
    def half(state, path):
        save_file({name: tensor * 0.5 for name, tensor in state.items()}, path)

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(AdapterError, match="do not read back"):
        save_heads(nn.ModuleDict({"score": make_head(8, seed=1)}), tmp_path)
    assert load_file(tmp_path / HEADS)
