"""What fills a batch up to whole steps, on a CPU in 16 bits, changes nothing; and products come in few shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.families import FAMILIES, VOCABULARY, tiny_model
from tests.models.method_cases import METHOD_CASES, method
from tests.toys import loaded, tiny_tokenizer

from tunesmith.data.forest import build_forest
from tunesmith.models import attention, policy
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy


def rows(lengths: tuple[int, ...], *, shared: int = 21, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows that begin with the same tokens and go on for so many of their own."""
    rng = np.random.default_rng(seed)
    start = rng.integers(1, VOCABULARY, shared)
    texts = [np.r_[start, rng.integers(1, VOCABULARY, n)] for n in lengths]
    return [(ids, np.r_[0, np.ones(len(ids) - 1)].astype(np.float32)) for ids in texts]


def results(make: Callable[[], Policy], given: list) -> list[torch.Tensor]:
    """Log-probabilities, and the gradients of their sum towards the input embeddings and what trains."""
    made, forest = make(), build_forest(given, min_shared=8)
    inputs = made.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T)[None]).detach().requires_grad_()
    logprobs = made(forest, embeddings=inputs).logprobs
    trained = [p for p in made.parameters() if p.requires_grad]
    return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), [inputs, *trained], materialize_grads=True)]


def fill_up(monkeypatch: pytest.MonkeyPatch, whether: bool) -> None:
    for module in (attention, policy):
        monkeypatch.setattr(module, "in_few_shapes", lambda like: whether)


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_up_changes_neither_values_nor_gradients(monkeypatch, family):
    given = rows((5, 16, 9, 30))
    found = {}
    for whether in (False, True):
        fill_up(monkeypatch, whether)
        found[whether] = results(lambda: Policy(tiny_model(family)), given)
    for plain, filled in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["prefix", "prompt", "prompt from text", "houlsby", "lora"])
def test_filling_up_stands_beside_learned_tokens(monkeypatch, case):
    settings = method(METHOD_CASES[case])
    found = {}
    for whether in (False, True):
        fill_up(monkeypatch, whether)
        found[whether] = results(lambda: Policy(attach(loaded(tiny_model("llama"), tiny_tokenizer()), settings, seed=0)), rows((5, 16, 9)))
    for plain, filled in zip(found[False], found[True], strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [3, 600])
def test_a_window_narrower_than_what_is_filled_up_hides_nothing_that_is_needed(monkeypatch, queries):
    fill_up(monkeypatch, True)
    mask = attention._mask((), 2, queries, queries + 5, 4, torch.zeros(1))
    real = torch.cat([mask[:queries], mask[len(mask) // 2 :][:queries]])
    age = torch.arange(5, queries + 5)[:, None] - torch.arange(mask.shape[1])[None]
    assert torch.equal(real == 0, ((age >= 0) & (age < 4)).repeat(2, 1))
    assert (mask == 0).any(1).all(), "a query that sees nothing would give NaN"


def test_in_16_bits_on_a_cpu_products_come_in_few_shapes(monkeypatch):
    shapes = set()
    bmm, baddbmm, linear = torch.bmm, torch.baddbmm, torch.nn.functional.linear

    def noting(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def noted(*given, **options):
            shapes.add((product.__name__, *(tuple(one.shape) for one in given[:3] if one is not None)))
            return product(*given, **options)

        return noted

    monkeypatch.setattr(torch, "bmm", noting(bmm))
    monkeypatch.setattr(torch, "baddbmm", noting(baddbmm))
    monkeypatch.setattr(torch.nn.functional, "linear", noting(linear))

    def count(dtype: torch.dtype) -> int:
        made = Policy(tiny_model("llama", dtype=dtype))
        shapes.clear()
        for seed in range(12):
            made.hidden(*with_embeddings(made, build_forest(rows((seed + 1, 14 - seed), seed=seed))))
        return len(shapes)

    in_fp32 = count(torch.float32)
    assert any(given[-2] % policy.STEP for name, given, *_ in shapes if name == "linear")
    assert count(torch.bfloat16) < in_fp32 / 2
    assert all(given[-2] % policy.STEP == 0 for name, given, *_ in shapes if name == "linear")


def with_embeddings(made: Policy, forest) -> tuple[torch.Tensor, object]:
    return made.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T)[None]), forest
