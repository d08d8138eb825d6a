"""Packed attention in 16 bits is as near to fp32 as a model's own, in values and in gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.families import tiny_model
from torch import Tensor

from tunesmith.data.forest import Node
from tunesmith.models import attention
from tunesmith.models import grouped as grouped_module
from tunesmith.models.attention import Layout, packed
from tunesmith.models.grouped import grouped, groups_of
from tunesmith.models.policy import Policy

NODES = (Node(0, 40, ()), Node(40, 90, ((0, 40),)), Node(90, 157, ((0, 40),)))  # two rows with one beginning, and a filled-up end
TOTAL, HEADS, KV_HEADS, DIM = 160, 4, 2, 32
SHORT = (torch.bfloat16, torch.float16)
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


def in_groups(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
    assert softcap is None
    return (grouped if query.dtype == torch.bfloat16 else packed)(query, key, value, Layout(NODES), scale, None, None)


@pytest.mark.parametrize("dtype, softcap, ours", [(d, s, ours) for d in SHORT for s in (None, 3.0)] + [(torch.bfloat16, None, in_groups)])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
@pytest.mark.parametrize("scale", [0.125, 0.2])
def test_rounding_in_16_bits_is_about_the_models_own(scale, sharp, dtype, softcap, ours):
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
        return sum(mask.numel() for mask in attention._masks[0][1].values())

    assert held(4096) == held(512)


def test_under_a_window_a_long_rows_masks_are_not_all_kept():
    nodes = (Node(0, 2 * attention.KEPT_MASKS * attention.QUERY_BLOCK, ()),)
    packed(*(torch.zeros(1, nodes[0].end, 8) for _ in range(3)), Layout(nodes), 1.0, 100, None)
    assert len(attention._masks[0][1]) == attention.KEPT_MASKS


def forest(rows: int, *, seed: int) -> tuple[tuple[Node, ...], int]:
    """A root, rows of many lengths below it and below one another, and tokens of no node at the end."""
    draw, nodes = np.random.default_rng(seed), [Node(0, 70, ())]
    while len(nodes) < rows:
        above = nodes[int(draw.integers(len(nodes)))]
        start = nodes[-1].end
        nodes.append(Node(start, start + int(draw.integers(1, 300)), (*above.ancestors, (above.start, above.end))))
    return tuple(nodes), nodes[-1].end + 7


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [16, 18])  # copied as words, or number by number
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("learned", [0, 5])
def test_blocks_of_one_shape_at_once_give_what_one_after_another_gives(learned, window, width, threads):
    nodes, total = forest(12, seed=learned)
    if learned:  # keys after the batch's own, which every node knows as its first ancestor
        nodes = tuple(Node(n.start, n.end, ((total, total + learned), *n.ancestors)) for n in nodes)
    draw = torch.Generator().manual_seed(0)
    shapes = ((6, total, width), (3, total + learned, width), (3, total + learned, width))
    given = [torch.randn(shape, generator=draw).bfloat16().requires_grad_() for shape in shapes]
    toward = torch.randn(total, 6, width, generator=draw)
    before, found = torch.get_num_threads(), {}
    for name, kernel, dtype, count in (
        ("exact", packed, torch.float64, 1),
        ("one by one", packed, torch.bfloat16, 1),
        ("grouped", grouped, torch.bfloat16, threads),
    ):
        torch.set_num_threads(count)
        inputs = [x.detach().to(dtype).requires_grad_() for x in given]
        out = kernel(*inputs, Layout(nodes), width**-0.5, window, None)
        found[name] = [out.detach(), *torch.autograd.grad(out, inputs, toward.bfloat16().to(dtype))]
    torch.set_num_threads(before)
    assert not found["grouped"][0][nodes[-1].end :].any(), "tokens of no node attend to nothing"
    for exact, one, ours in zip(*found.values(), strict=True):
        errors = [float((x.double() - exact).norm() / exact.norm()) for x in (one, ours)]
        assert errors[1] <= 1.1 * errors[0], errors


def test_every_query_is_in_one_group_with_the_keys_of_its_block():
    nodes, total = forest(40, seed=1)
    groups = groups_of(nodes, heads=6)
    seen = sorted(int(q) for group in groups for b, n in enumerate(group.queries_B) for q in group.queries_Bn[b, :n])
    assert seen == list(range(total - 7))
    for group in groups:
        count, n, m = len(group.queries_Bn), group.queries_Bn.shape[1], group.keys_Bm.shape[1]
        assert (count & (count - 1), n % 32, m % 32) == (0, 0, 0), "each shape is a kernel that oneDNN keeps"
        assert count == 1 or count * 6 * n * m <= grouped_module.SCORES
        for b in range(count):
            assert group.keys_Bm[b, group.keys_B[b] - 1] == group.queries_Bn[b, group.queries_B[b] - 1], "the last sees itself"


def test_what_the_loops_do_not_read_and_rows_too_long_are_left_to_the_other_kernel(monkeypatch):
    inputs = [torch.randn(n, TOTAL, DIM, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 2)]
    want = packed(*inputs, Layout(NODES), 0.2, None, None)
    assert torch.equal(grouped(*inputs, Layout(NODES), 0.2, None, None), want)
    inputs = [x.bfloat16() for x in inputs]
    monkeypatch.setattr(grouped_module, "INDICES", 100)
    assert torch.equal(grouped(*inputs, Layout(NODES), 0.2, None, None), packed(*inputs, Layout(NODES), 0.2, None, None))


def test_a_score_that_is_not_a_number_is_seen_in_its_row_alone():
    nodes = (Node(0, 50, ()), Node(50, 90, ()))
    inputs = [torch.randn(n, 96, 16, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (4, 2, 2)]
    inputs[1][0, 60, 3] = float("nan")
    bad = ~grouped(*inputs, Layout(nodes), 0.25, None, None).isfinite().all(-1)
    assert bad[60:90, :2].all(), "of the heads and queries that see the key"
    assert bad.sum() == 2 * 30


def test_a_kernel_that_computes_something_else_is_left_out(monkeypatch):
    right = grouped_module.scaled_product
    monkeypatch.setattr(grouped_module, "scaled_product", lambda a, b, scale: right(a, b, 1.1 * scale))
    paths = Policy(tiny_model("llama", dtype=torch.bfloat16)).fast_paths
    assert paths.refused["grouped_attention"] == "it computes something else"
    assert "kernels" in paths.used


@pytest.mark.parametrize("family, takes_it", [("llama", True), ("gemma2", False)])
def test_a_model_with_a_soft_cap_does_not_say_that_its_blocks_are_grouped(family, takes_it):
    paths = Policy(tiny_model(family, dtype=torch.bfloat16)).fast_paths
    assert ("grouped_attention" in paths.used) == takes_it
    assert "grouped_attention" not in paths.refused
