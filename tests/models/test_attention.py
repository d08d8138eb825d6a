"""Packed attention in 16 bits is as near to fp32 as a model's own, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.data.forest import Node
from tunesmith.models.attention import Layout, packed

NODES = (Node(0, 40, ()), Node(40, 90, ((0, 40),)), Node(90, 157, ((0, 40),)))  # two rows with one beginning, and a filled-up end
TOTAL, HEADS, KV_HEADS, DIM, SCALE = 160, 4, 2, 32, 0.2


def own(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
    """The attention that transformers' models compute by themselves ("eager"): softmax in fp32, rounded before the last product."""
    sees = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    for node in NODES:
        for a, b in node.ancestors:
            sees[node.start : node.end, a:b] = True
        sees[node.start : node.end, node.start : node.end] = torch.ones(node.end - node.start, node.end - node.start).tril().bool()
    sees.fill_diagonal_(True)
    groups = HEADS // KV_HEADS
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    probs = torch.softmax(scores.masked_fill(~sees, float("-inf")), -1, dtype=torch.float32).to(query.dtype)
    return (probs @ value.repeat_interleave(groups, 0)).transpose(0, 1)


def ours(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
    return packed(query, key, value, Layout(NODES), SCALE, None, softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_rounding_in_16_bits_is_no_larger_than_the_models_own(softcap, sharp):
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(n, TOTAL, DIM, generator=draw) * s for n, s in ((HEADS, sharp), (KV_HEADS, 1.0), (KV_HEADS, 1.0))]
    towards = torch.randn(TOTAL, HEADS, DIM, generator=draw).bfloat16()
    towards[NODES[-1].end :] = 0  # what is filled up is nobody's

    def results(attend, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in given]
        out = attend(*inputs, softcap)[: NODES[-1].end]
        return [out.detach(), *torch.autograd.grad(out, inputs, towards[: len(out)].to(dtype))]

    exact = results(own, torch.float64)
    errors = {
        name: [float((x.double() - y).norm() / y.norm()) for x, y in zip(results(attend, torch.bfloat16), exact, strict=True)]
        for name, attend in (("own", own), ("ours", ours))
    }
    assert all(mine <= theirs for mine, theirs in zip(errors["ours"], errors["own"], strict=True)), errors
    in_fp32 = results(ours, torch.float32)
    for mine, one in zip(in_fp32, exact, strict=True):
        torch.testing.assert_close(mine.double(), one, rtol=1e-4, atol=1e-5)
