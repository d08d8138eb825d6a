"""What fills generation's products up to whole steps, on a CPU in 16 bits, changes nothing; and products come in few shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, tiny_model
from tests.generate.helpers import ANSWERS, generator, prompts_with_prefix, reference_logprobs, tokens_of
from tests.models.method_cases import METHOD_CASES, method
from tests.toys import loaded, tiny_tokenizer
from tunesmith.generate import attention, cache
from tunesmith.models.attention import KEY_STEP, QUERY_STEP
from tunesmith.models.methods import attach

PROMPTS = prompts_with_prefix(len(ANSWERS), prefix=37, longest=30)


def fill_up(monkeypatch: pytest.MonkeyPatch, whether: bool) -> None:
    for module in (attention, cache):
        monkeypatch.setattr(module, "in_few_shapes", lambda like: whether)


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_up_changes_neither_answers_nor_their_log_probabilities(monkeypatch, family):
    model, answers = tiny_model(family).eval(), {}
    for whether in (False, True):
        fill_up(monkeypatch, whether)
        ways = generator(model, batch_size=4)
        answers[whether] = tokens_of(ways.generate(PROMPTS, max_new_tokens=40))
        scores = ways.logprobs(PROMPTS, ANSWERS)
        assert not ways.notes
    assert answers[True] == answers[False]
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        np.testing.assert_allclose(score, reference_logprobs(model, prompt, answer), atol=1e-4)


def test_filling_up_stands_behind_learned_keys_and_before_a_prompts_own(monkeypatch):
    model = attach(loaded(tiny_model("llama"), tiny_tokenizer()), method(METHOD_CASES["prefix"]), seed=0).eval()
    found = {}
    for whether in (False, True):
        fill_up(monkeypatch, whether)
        ways = generator(model)
        found[whether] = ways.logprobs(PROMPTS, ANSWERS)
        assert not ways.notes
    for plain, filled in zip(found[False], found[True], strict=True):
        np.testing.assert_allclose(filled, plain, atol=1e-5)


def test_in_16_bits_on_a_cpu_products_come_in_few_shapes(monkeypatch):
    shapes, bmm = set(), torch.bmm

    def noted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.add((tuple(a.shape), tuple(b.shape)))
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", noted)

    def made(dtype: torch.dtype) -> set[tuple]:
        ways = generator(tiny_model("llama", dtype=dtype).eval(), batch_size=4)
        shapes.clear()
        for seed in range(6):
            prompts = prompts_with_prefix(8, prefix=40 + seed, longest=40, seed=seed)
            ways.generate(prompts, max_new_tokens=6)
        return set(shapes)

    in_fp32, in_bf16 = made(torch.float32), made(torch.bfloat16)
    assert len(in_bf16) < len(in_fp32) / 2
    assert any(rows > QUERY_STEP for (_, rows, _), _ in in_bf16)
    assert all(rows % QUERY_STEP == 0 for (_, rows, _), _ in in_bf16 if rows > QUERY_STEP)
    head = tiny_model("llama").config.head_dim
    assert head % KEY_STEP, "else keys could not be told from a head's width"
    assert all(size == head or size % KEY_STEP == 0 for a, b in in_bf16 for size in (a[2], b[2]))
