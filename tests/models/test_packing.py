"""The forest against each row alone: on every model layout, in fp32."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.families import FAMILIES, VOCABULARY, tiny_model

from tunesmith.data.forest import build_forest
from tunesmith.errors import ModelError
from tunesmith.models.methods import target_modules
from tunesmith.models.policy import Policy


def _rows(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Eight rows: a common system prompt, two groups that share a prompt below it (three deep), one equal pair, a stranger."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return rng.integers(1, VOCABULARY, n)

    system, first, second = draw(20), draw(17), draw(18)
    bodies = [
        [system, first, draw(6)],
        [system, first, draw(9)],
        [system, second, draw(5)],
        [system, second, draw(1)],
        [system, draw(8)],
        [draw(12)],
    ]
    rows = [np.concatenate(parts) for parts in bodies]
    rows += [rows[0].copy(), np.concatenate([system, first])]
    weights = [rng.choice([0.0, 1.0, 0.5], len(row)).astype(np.float32) for row in rows]
    for w in weights:
        w[0], w[-1] = 0, 1
    return list(zip(rows, weights, strict=True))


def _alone(model: torch.nn.Module, rows: list) -> torch.Tensor:
    """Log-probabilities of the supervised tokens, each row through the stock forward by itself."""
    out = []
    for ids, weights in rows:
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].float()
        logprobs = torch.log_softmax(logits[:-1], -1).gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
        out.append(logprobs[torch.from_numpy(weights[1:] != 0)])
    return torch.cat(out)


@pytest.mark.parametrize("min_shared", [1, 16, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_rows_alone_in_loss_and_gradient(family, min_shared):
    rows = _rows()
    plain = tiny_model(family)
    policy = Policy(copy.deepcopy(plain))
    forest = build_forest(rows, min_shared=min_shared)
    weights = torch.from_numpy(forest.weight_S)
    want = _alone(plain, rows)
    got = policy(forest).logprobs
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (weights * want).sum().backward()
    (weights * got).sum().backward()
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(plain.named_parameters(), policy.causal.parameters(), strict=True):
        if p.grad is not None:
            difference = (p.grad - q.grad).norm() / max(p.grad.norm(), 1e-5 * largest)
            assert difference < 1e-5 or p.grad.norm() < 1e-4 * largest, f"{name}: {difference}"


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_from_one_row_to_another(family, row):
    rows = [(ids, w) for ids, w in _rows()[4:6]]
    policy = Policy(tiny_model(family))
    forest = build_forest(rows, min_shared=10_000)
    embeddings = policy.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T)[None]).detach().requires_grad_()
    hidden = policy.hidden(embeddings, forest)
    own = torch.zeros(len(forest.tokens_T), dtype=torch.bool)
    node = next(n for n in forest.nodes if n.end - 1 == forest.last_B[row])
    own[node.start : node.end] = True
    hidden[own].square().sum().backward()
    assert embeddings.grad[0][own].abs().max() > 0
    assert embeddings.grad[0][~own].abs().max() == 0


def test_sharing_computes_each_common_token_once():
    rows = _rows()
    forest = build_forest(rows)
    assert len(forest.tokens_T) == 20 + 17 + 6 + 9 + 18 + 5 + 1 + 8 + 12
    assert forest.lengths_B.tolist() == [len(ids) for ids, _ in rows]


@pytest.mark.parametrize("seed", range(40))
def test_every_row_can_be_read_back_along_its_path(seed):
    rng = np.random.default_rng(seed)
    stems = [rng.integers(0, 3, rng.integers(0, 30)) for _ in range(3)]
    rows = [np.concatenate([stems[rng.integers(3)], rng.integers(0, 3, rng.integers(1, 25))]) for _ in range(9)]
    weights = [np.r_[0, np.ones(len(r) - 1)].astype(np.float32) for r in rows]
    forest = build_forest(list(zip(rows, weights, strict=True)), min_shared=int(rng.integers(1, 20)))
    for b, row in enumerate(rows):
        mine = forest.row_S == b
        assert forest.target_S[mine].tolist() == row[1:].tolist()
        assert forest.tokens_T[forest.source_S[mine]].tolist() == row[:-1].tolist()
        assert forest.positions_T[forest.source_S[mine]].tolist() == list(range(len(row) - 1))
        node = next(n for n in forest.nodes if n.start <= forest.last_B[b] < n.end)
        path = [*node.ancestors, (node.start, int(forest.last_B[b]) + 1)]
        assert np.concatenate([forest.tokens_T[a:e] for a, e in path]).tolist() == row.tolist()


def test_long_nodes_are_computed_in_blocks_that_change_nothing(monkeypatch):
    rows = _rows(3)
    policy = Policy(tiny_model("gemma2"))
    forest = build_forest(rows)
    whole = policy(forest).logprobs
    monkeypatch.setattr("tunesmith.models.attention.QUERY_BLOCK", 4)
    torch.testing.assert_close(policy(forest).logprobs, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_checkpointing_gives_the_same_gradients(family):
    rows = _rows()
    forest = build_forest(rows)
    gradients = []
    for checkpointing in (False, True):
        policy = Policy(tiny_model(family), gradient_checkpointing=checkpointing)
        policy(forest).logprobs.sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "longest row"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layers of type chunked_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of type linear_attention"),
    ],
)
def test_a_model_whose_rows_depend_on_their_batch_is_refused(changed, reason):
    model = tiny_model("qwen3")
    for name, value in changed.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=reason):
        Policy(model)


def test_a_model_without_a_backbone_of_its_own_is_refused():
    model = tiny_model("llama")
    model.base_model_prefix = "nowhere"
    for use in (Policy, lambda m: target_modules(m, None)):
        with pytest.raises(ModelError, match="LlamaForCausalLM has no backbone"):
            use(model)


def test_the_head_runs_only_where_its_outputs_are_needed(monkeypatch):
    policy = Policy(tiny_model("llama"))
    policy.heads["value"] = torch.nn.Linear(32, 1)
    policy.heads["score"] = torch.nn.Linear(32, 1)
    forest = build_forest(_rows())
    assert policy(forest, ("entropy",)).entropy is not None
    monkeypatch.setattr(policy, "_head", None)
    outputs = policy(forest, ("values", "scores"))
    assert outputs.logprobs is None
    assert (len(outputs.values), len(outputs.scores)) == (len(forest.target_S), 8)
