"""Generation and scoring with learned tokens before every row, against PEFT's own forward without a cache, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from tests.generate.helpers import ANSWERS, generator, prompts_with_prefix, tokens_of
from tests.models.test_prompts import LEARNED, LONG, moved, tuned
from tunesmith.errors import ModelError
from tunesmith.generate import Sampling

PROMPTS = [*prompts_with_prefix(5), [5], [7, 8]]  # with a common beginning but for two


def full_forward(model, ids):
    """Logits [T, V] of one row's own tokens, by PEFT's forward over all of it."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, -len(ids) :].float()


def greedy(model, prompt, tokens):
    ids, logprobs = list(prompt), []
    while len(logprobs) < tokens and (not logprobs or ids[-1] != 0):
        row = full_forward(model, ids)[-1].log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("case", ["prompt", "p_tuning", "prefix projection", *LONG])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_those_of_a_full_forward_for_every_token(family, case):
    model = tuned(case, family).eval()
    for prompts in (PROMPTS, PROMPTS[:5]):  # without and with a beginning that all share
        ours = generator(model, batch_size=3)
        answers = ours.generate(prompts, max_new_tokens=5, logprobs=True)
        assert not ours.notes  # the fast way
        for answer, prompt in zip(answers, prompts, strict=True):
            tokens, logprobs = greedy(model, prompt, 5)
            assert answer.token_ids == tokens
            np.testing.assert_allclose(answer.logprobs, logprobs, atol=1e-4)
    for scores, prompt, answer in zip(ours.logprobs(PROMPTS, ANSWERS[:7]), PROMPTS, ANSWERS, strict=False):
        want = full_forward(model, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1)[range(len(answer)), answer]
        np.testing.assert_allclose(scores, want, atol=1e-4)


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_a_sampled_answer_is_a_function_of_its_seed_and_not_of_its_batch(case):
    model = tuned(case).eval()
    sampling, seeds = Sampling(temperature=1.0), list(range(len(PROMPTS)))
    together = generator(model, batch_size=7).generate(PROMPTS, max_new_tokens=5, sampling=sampling, seeds=seeds)
    each = [generator(model).generate([p], max_new_tokens=5, sampling=sampling, seeds=[s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert tokens_of(together) == tokens_of(each)


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_what_is_learned_meanwhile_is_what_answers(case):
    model = tuned(case).eval()
    ours = generator(model)
    before = ours.logprobs(PROMPTS, ANSWERS[:7])
    moved(model, 1.0)
    after = ours.logprobs(PROMPTS, ANSWERS[:7])
    fresh = generator(model).logprobs(PROMPTS, ANSWERS[:7])
    assert max(np.abs(a - b).max() for a, b in zip(before, after, strict=True)) > 0.01
    assert all(np.array_equal(a, b) for a, b in zip(after, fresh, strict=True))


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_learned_tokens_take_room_of_the_context(case):
    model = tuned(case, "gpt2").eval()  # 128 positions, 4 of which are learned tokens'
    taken = LEARNED[case]["num_virtual_tokens"]
    assert len(generator(model).generate([[5] * 122], max_new_tokens=9)[0].token_ids) <= 128 - 122 - taken
    with pytest.raises(ModelError, match="124 tokens and 4 learned ones do not fit the model's context of 128"):
        generator(model).generate([[5] * 124], max_new_tokens=1)
    with pytest.raises(ModelError, match="and 4 learned ones do not fit"):
        generator(model).logprobs([[5] * 120], [[6] * 6])
