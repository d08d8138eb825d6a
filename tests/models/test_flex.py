"""The forest's visibility as one rule, and FlexAttention by it, against the packed attention.

torch refuses flex's backward pass on a CPU by a check; where gradients are compared here that check is taken out, and torch's own
reference formula computes them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.families import tiny_model
from tests.toys import batch_of, make_rows
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask

from tunesmith.data.forest import Forest, Node, build_forest
from tunesmith.models import flex as flex_module
from tunesmith.models.attention import FOREST, Layout, packed
from tunesmith.models.flex import FLEX, FLEX_ATTENTION, Visibility, flex, flex_masks, use_flex, visibility
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.train.invariants import fast_paths_agree

BATCH = batch_of(make_rows(6, shared=20))


@pytest.fixture
def backward_on_cpu(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_warn_once", lambda *told, **more: None, raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    """What dynamo has traced, which a changed rule would not change."""
    torch._dynamo.reset()


def random_rows(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows that share beginnings three deep, some equal, one a beginning of another."""
    rng = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        return rng.integers(1, 90, rng.integers(1, 7))

    rows = []
    for _ in range(2):
        root = draw()
        rows.append(np.r_[root, draw()])
        for _ in range(2):
            child = np.r_[root, draw()]
            rows += [np.r_[child, draw()] for _ in range(rng.integers(1, 4))] + [child]
    rows.append(rows[0].copy())
    return [(row, np.zeros(len(row), dtype=np.float32)) for row in rows]


def sees(nodes: tuple[Node, ...], queries: int, keys: int, window: int | None) -> np.ndarray:
    """[queries, keys]: which keys the packed attention gives weight to, where all scores are equal."""
    out = packed(torch.zeros(1, queries, keys), torch.zeros(1, keys, keys), torch.eye(keys)[None], Layout(nodes), 1.0, window, None)
    return out[:, 0].numpy() > 0


def layout_of(forest: Forest, window: int | None) -> Layout:
    total = len(forest.tokens_T)
    return Layout(forest.nodes, None, flex_masks(forest.nodes, total, total, {window}, torch.device("cpu")))


def table(rule: Visibility, queries: int, window: int | None) -> np.ndarray:
    return rule.seen(np.arange(queries)[:, None], np.arange(len(rule.entry_T))[None], window)


def test_three_deep_forest_by_hand():
    # a: 0-1; b: 2 and c: 3-4 below a; d: 5 below c; e: 6, a root of its own
    nodes = (Node(0, 2, ()), Node(2, 3, ((0, 2),)), Node(3, 5, ((0, 2),)), Node(5, 6, ((0, 2), (3, 5))), Node(6, 7, ()))
    rule = visibility(nodes, 7)
    assert rule.entry_T.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert rule.exit_T.tolist() == [4, 4, 2, 4, 4, 4, 5]
    assert rule.position_T.tolist() == [0, 1, 2, 2, 3, 4, 0]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 1, 3, 4, 5], [6]]
    assert [np.flatnonzero(row).tolist() for row in table(rule, 7, None)] == seen
    assert [np.flatnonzero(row).tolist() for row in table(rule, 7, 2)] == [[0], [0, 1], [1, 2], [1, 3], [3, 4], [4, 5], [6]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("seed", range(12))
def test_the_rule_is_what_the_packed_attention_sees(seed, window):
    forest = build_forest(random_rows(seed), min_shared=1)
    assert max(len(node.ancestors) for node in forest.nodes) >= 2
    total = len(forest.tokens_T)
    rule = visibility(forest.nodes, total)
    np.testing.assert_array_equal(table(rule, total, window), sees(forest.nodes, total, total, window))
    np.testing.assert_array_equal(rule.position_T, forest.positions_T)


def test_learned_keys_after_the_tokens_are_a_root_of_all():
    forest = build_forest(random_rows(1), min_shared=1)
    total = len(forest.tokens_T)
    nodes = tuple(Node(node.start, node.end, ((total, total + 3), *node.ancestors)) for node in forest.nodes)
    rule = visibility(nodes, total + 3)
    np.testing.assert_array_equal(table(rule, total, None), sees(nodes, total, total + 3, None))
    assert (rule.position_T[:total] == forest.positions_T + 3).all()


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("seed", range(3))
def test_the_blocks_of_a_mask_are_those_that_torch_finds_in_the_whole_of_it(seed, window):
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(100, 500)), int(rng.integers(1, 200))) for _ in range(4)]
    root = rng.integers(1, 90, 260)
    rows = [np.r_[root[:shared], rng.integers(1, 90, own)] for shared, own in lengths]
    forest = build_forest([(row, np.zeros(len(row), dtype=np.float32)) for row in rows])
    total = len(forest.tokens_T)
    ours = flex_masks(forest.nodes, total, total, {window}, torch.device("cpu"))[window]
    theirs = create_block_mask(ours.mask_mod, None, None, total, total, device="cpu")
    assert len(ours.kv_num_blocks[0, 0]) > 2
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("kv_heads, window, softcap", [(4, None, None), (2, None, None), (1, 4, None), (2, 4, 3.0)])
def test_flex_attention_gives_the_packed_outputs_and_gradients(backward_on_cpu, kv_heads, window, softcap):
    forest = build_forest(random_rows(2), min_shared=1)
    total = len(forest.tokens_T)
    torch.manual_seed(0)
    given = [torch.randn(heads, total, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    toward, found = torch.randn(total, 4, 8), []
    for kernel in (flex, packed):
        out = kernel(*given, layout_of(forest, window), 0.7, window, softcap)
        found.append([out, *torch.autograd.grad(out, given, toward)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_a_model_on_flex_attention_agrees_with_the_plain_one_and_keeps_it(backward_on_cpu, family):
    policy = Policy(tiny_model(family))
    use_flex(policy.causal, policy.fast_paths)
    assert FLEX_ATTENTION in policy.fast_paths.used
    assert fast_paths_agree(policy, SFT(), BATCH) == []
    assert policy.causal.config._attn_implementation == FLEX
    with policy.plain():
        assert policy.causal.config._attn_implementation == FOREST


def test_flex_attention_that_sees_too_much_is_dropped(backward_on_cpu, monkeypatch):
    policy = Policy(tiny_model("llama"))
    use_flex(policy.causal, policy.fast_paths)
    monkeypatch.setattr(Visibility, "seen", lambda self, q, k, window=None: self.position_T[k] <= self.position_T[q])
    forget()
    assert FLEX_ATTENTION in fast_paths_agree(policy, SFT(), BATCH)
    assert policy.causal.config._attn_implementation == FOREST
    other = Policy(tiny_model("llama"))
    use_flex(other.causal, other.fast_paths)
    assert other.fast_paths.refused[FLEX_ATTENTION] == "it computes something else"


def test_compiled_it_is_traced_whole_and_not_again_for_every_batch(backward_on_cpu, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch_flex.flex_attention, backend=counter, fullgraph=True, dynamic=True)
    monkeypatch.setattr(flex_module, "flex_attention", compiled)
    for count in (2, 5, 11, 12):
        forest = build_forest(make_rows(count, seed=count, shared=20))
        given = [torch.randn(heads, len(forest.tokens_T), 8, requires_grad=True) for heads in (4, 2, 2)]
        for window in (None, 7):
            out, want = (kernel(*given, layout_of(forest, window), 0.3, window, None) for kernel in (flex, packed))
            for mine, theirs in zip(torch.autograd.grad(out.sum(), given), torch.autograd.grad(want.sum(), given), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 6, "with and without a window, one block and more, with and without whole blocks that are seen"


def test_the_trial_has_blocks_that_are_seen_whole_in_part_and_not(backward_on_cpu, monkeypatch):
    made, right = [], flex_module.flex_masks
    monkeypatch.setattr(flex_module, "flex_masks", lambda *given: made.append(right(*given)) or made[-1])
    policy = Policy(tiny_model("llama"))
    use_flex(policy.causal, policy.fast_paths)
    (masks,) = made
    mask = masks[None]
    whole, part = mask.full_kv_num_blocks.flatten(), mask.kv_num_blocks.flatten()
    assert whole.max() >= 3
    assert part.max() >= 1
    assert (whole + part).min() < len(whole)


def test_where_flex_attention_does_not_run_the_packed_one_stays():
    policy = Policy(tiny_model("llama"))
    assert policy.causal.config._attn_implementation == FOREST
    use_flex(policy.causal, policy.fast_paths)
    assert "does not support backward on CPU" in policy.fast_paths.refused[FLEX_ATTENTION]
    assert policy.causal.config._attn_implementation == FOREST
