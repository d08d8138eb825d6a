"""Packed attention in 16 bits is as near to fp32 as a model's own, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.data.forest import Node
from tunesmith.models import attention
from tunesmith.models.attention import Layout, packed

NODES = (Node(0, 40, ()), Node(40, 90, ((0, 40),)), Node(90, 157, ((0, 40),)))  # two rows with one beginning, and a filled-up end
TOTAL, HEADS, KV_HEADS, DIM = 160, 4, 2, 32
GRADIENTS = 1.2  # times the error of the models' own attention; where the scale is no power of two, theirs is the larger


def own(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The attention that transformers' models compute by themselves ("eager"): softmax in fp32, rounded before the last product."""
    sees = torch.zeros(TOTAL, TOTAL, dtype=torch.bool)
    for node in NODES:
        for a, b in node.ancestors:
            sees[node.start : node.end, a:b] = True
        sees[node.start : node.end, node.start : node.end] = torch.ones(node.end - node.start, node.end - node.start).tril().bool()
    sees.fill_diagonal_(True)
    groups = HEADS // KV_HEADS
    scores = query @ key.repeat_interleave(groups, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    probs = torch.softmax(scores.masked_fill(~sees, float("-inf")), -1, dtype=torch.float32).to(query.dtype)
    return (probs @ value.repeat_interleave(groups, 0)).transpose(0, 1)


def ours(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    return packed(query, key, value, Layout(NODES), scale, None, softcap)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
@pytest.mark.parametrize("scale", [0.125, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_16_bits_is_about_the_models_own(dtype, scale, sharp, softcap):
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(n, TOTAL, DIM, generator=draw) * s for n, s in ((HEADS, sharp), (KV_HEADS, 1.0), (KV_HEADS, 1.0))]
    towards = torch.randn(TOTAL, HEADS, DIM, generator=draw).to(dtype)
    towards[NODES[-1].end :] = 0  # what is filled up is nobody's

    def results(attend, held: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).to(held).requires_grad_() for x in given]
        out = attend(*inputs, scale, softcap)[: NODES[-1].end]
        return [out.detach(), *torch.autograd.grad(out, inputs, towards[: len(out)].to(held))]

    exact = results(own, torch.float64)
    errors = {
        name: [float((x.double() - y).norm() / y.norm()) for x, y in zip(results(attend, dtype), exact, strict=True)]
        for name, attend in (("own", own), ("ours", ours))
    }
    most = [1.01, GRADIENTS, GRADIENTS, GRADIENTS]
    assert all(mine <= factor * theirs for factor, mine, theirs in zip(most, errors["ours"], errors["own"], strict=True)), errors
    in_fp32 = results(ours, torch.float32)
    for mine, one in zip(in_fp32, exact, strict=True):
        torch.testing.assert_close(mine.double(), one, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_fits_fp16_is_not_too_large_before_it_is_scaled():
    draw = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(n, TOTAL, DIM, generator=draw) * 8).half().requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS)]
    towards = torch.zeros(TOTAL, HEADS, DIM, dtype=torch.float16)
    towards[: NODES[-1].end] = 128 * torch.randn(NODES[-1].end, HEADS, DIM, generator=draw)
    for found in torch.autograd.grad(ours(*inputs, 1 / 128, None), inputs[:2], towards):
        assert found.isfinite().all()
        assert found.abs().max() * 128 > torch.finfo(torch.float16).max, "or the case shows nothing"


def test_masks_of_a_long_row_do_not_grow_with_its_square():
    def held(tokens: int) -> int:
        nodes = (Node(0, tokens, ()),)
        packed(*(torch.zeros(1, tokens, 8) for _ in range(3)), Layout(nodes), 1.0, None, None)
        return sum(mask.numel() for mask in attention._masks.values())

    assert held(4096) == held(512)
