"""Answering in bf16 on a CPU: the compiled loops give what torch gives, are in use, and are gone from the model after."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import tiny_model
from tests.generate.helpers import ANSWERS, generator, prompts_with_prefix, reference_logprobs, tokens_of
from tests.models.method_cases import METHOD_CASES, method
from tests.toys import loaded, tiny_tokenizer
from tunesmith.data.forest import Node
from tunesmith.generate import Sampling, attention
from tunesmith.generate.cache import PrefixCache
from tunesmith.generate.engine import Engine
from tunesmith.generate.local import KEPT_PLAIN
from tunesmith.models import fused, kernels
from tunesmith.models import grouped as grouped_module
from tunesmith.models.fused import remove_fast_forwards
from tunesmith.models.grouped import groups_of
from tunesmith.models.methods import attach
from tunesmith.models.policy import Policy

STEP = 2**-8  # of bf16, relative
PROMPTS = prompts_with_prefix(len(ANSWERS), prefix=37, longest=30)


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator).bfloat16()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("window", [0, 5, 30, 200])
@pytest.mark.parametrize("shared", [0, 11, 64])
def test_a_step_attends_to_the_prefix_and_to_its_own_slots_alone(monkeypatch, shared, window, threads):
    """Against fp64, with slots before a row's own and after the pass's full of what nobody may see."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "AT_LEAST", 1)
    rng = torch.Generator().manual_seed(shared + window)
    B, K, G, D, Dv, slots, used, scale, starts = 5, 2, 3, 24, 40, 50, 43, 0.4, [0, 7, 20, 41, 42]
    query, keys, values = numbers(rng, B, K * G, D), numbers(rng, K, B, slots, D), numbers(rng, K, B, slots, Dv)
    keys[:, :, used:], values[:, :, used:] = torch.inf, torch.nan
    for b, start in enumerate(starts):
        keys[:, b, :start], values[:, b, :start] = torch.inf, torch.nan
    prefix = numbers(rng, K, shared, D)
    scores = query.view(B, K, G, D).transpose(0, 1).reshape(K, B * G, D) @ prefix.mT
    given, scores = scores.double(), torch.nn.functional.pad(scores, (0, 5, 0, 2), value=3.0)
    how = {"starts_B": np.array(starts), "used": used, "shared": shared, "window": window, "scale": scale}
    out = kernels.attend_step(query, keys, values, scores if shared else None, **how)
    for b, start in enumerate(starts):
        for head in range(K * G):
            kv, line = head // G, b * G + head % G
            logits = torch.cat([given[kv, line], keys[kv, b, start:used].double() @ query[b, head].double()]) * scale
            if window:
                logits[: max(0, len(logits) - window)] = -torch.inf
            weights = torch.softmax(logits, 0)
            want = weights[shared:] @ values[kv, b, start:used].double()
            assert (out[b, head].double() - want).abs().max() <= STEP * want.abs().max() + 1e-6
            if shared:
                assert (scores[kv, line, :shared].double() - weights[:shared]).abs().max() <= STEP * float(weights[:shared].max())
                assert not scores[kv, line, shared:].any()


def test_a_steps_nan_is_not_lost():
    rng = torch.Generator().manual_seed(0)
    query, keys, values = numbers(rng, 3, 2, 16), numbers(rng, 1, 3, 8, 16), numbers(rng, 1, 3, 8, 16)
    query[1, 0, 3] = torch.nan
    out = kernels.attend_step(query, keys, values, None, starts_B=np.zeros(3, np.int64), used=8, shared=0, window=0, scale=1.0)
    assert out[1, 0].isnan().all()
    assert out.isnan().sum() == 16


def switch(monkeypatch: pytest.MonkeyPatch, loops: bool) -> list[str]:
    """Gives what is noted where loops are in use or not."""
    monkeypatch.setattr(kernels, "unavailable", lambda: None if loops else "switched off")
    return [] if loops else ["LlamaForCausalLM: answers come without the compiled loops, which is slower: switched off"]


def counting(monkeypatch: pytest.MonkeyPatch, name: str, owner: Any = kernels) -> list[int]:
    """Grows by one with each call of a loop, or of what else bears the name."""
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **how: (calls.append(1), real(*given, **how))[1])
    return calls


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_with_the_loops_answers_are_scored_as_near_to_fp32_as_without(monkeypatch, family):
    """Rows after a shared prefix, of which the longer ones are more than one block of queries."""
    model = tiny_model(family).eval()
    model.config.max_position_embeddings = 512  # which these families' layers do not depend on
    halved = copy.deepcopy(model).bfloat16()
    model = copy.deepcopy(halved).float()  # the same weights
    answers = [answer * 13 for answer in ANSWERS]
    exact = [reference_logprobs(model, prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    off, blocks = {}, counting(monkeypatch, "softmax")
    for loops in (False, True):
        switch(monkeypatch, loops)
        ways = generator(halved, batch_size=4)
        found = ways.logprobs(PROMPTS, answers)
        assert len(ways.notes) == (not loops)
        assert bool(blocks) == loops
        off[loops] = max(float(np.abs(a - b).max()) for a, b in zip(found, exact, strict=True))
    assert off[True] <= 1.5 * off[False] + 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_step_after_rows_gives_what_a_pass_over_all_tokens_gives(monkeypatch, family):
    """The log-probabilities that an answer's steps had are as near to fp32 as those that a pass over prompt and answer has, also after
    rows that have ended were dropped."""
    model = tiny_model(family, dtype=torch.bfloat16).eval()
    exact = copy.deepcopy(model).float()
    steps, dropped, real = counting(monkeypatch, "attend_step"), [], PrefixCache.keep
    monkeypatch.setattr(PrefixCache, "keep", lambda cache, rows: (dropped.append(len(rows)), real(cache, rows))[1])
    stop_ids = [token for token in range(97) if token % 12 == 0]  # so that answers end after unlike numbers of tokens
    ways = generator(model, batch_size=11, stop_ids=stop_ids)
    answers = ways.generate(PROMPTS, max_new_tokens=30, logprobs=True, sampling=Sampling(temperature=1.0), seeds=range(len(PROMPTS)))
    assert len(steps) >= 20
    assert dropped
    again, off = ways.logprobs(PROMPTS, tokens_of(answers)), []
    for prompt, answer, scores in zip(PROMPTS, answers, again, strict=True):
        wanted = reference_logprobs(exact, prompt, answer.token_ids)
        off.append([np.abs(np.array(found) - wanted) for found in (answer.logprobs, scores)])
    by_steps, by_rows = (float(np.concatenate(errors).mean()) for errors in zip(*off, strict=True))
    assert by_steps <= 1.3 * by_rows


@pytest.mark.parametrize("ending", [None, RuntimeError])
def test_the_fast_layers_are_in_use_while_answering_and_gone_after(monkeypatch, ending):
    model = attach(loaded(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()), method(METHOD_CASES["lora"]), seed=0).eval()
    ways = generator(model)
    ways.generate(PROMPTS[:2], max_new_tokens=1)  # the check
    used, real = [], kernels.rms_norm

    def noted(*given):
        used.append(1)
        if ending is not None:
            raise ending("broken off")
        return real(*given)

    monkeypatch.setattr(kernels, "rms_norm", noted)
    if ending is None:
        ways.generate(PROMPTS, max_new_tokens=2)
    else:
        with pytest.raises(ending):
            ways.generate(PROMPTS, max_new_tokens=2)
    assert used
    assert not remove_fast_forwards(model)


@pytest.mark.parametrize("of_a_policy", [False, True])
def test_the_check_compares_with_the_models_own_layers(monkeypatch, of_a_policy):
    """A fast layer that computed something else would agree with itself."""
    model = tiny_model("llama", dtype=torch.bfloat16).eval()
    if of_a_policy:
        Policy(model)
    ways = generator(model)
    ways.generate(PROMPTS[:2], max_new_tokens=1)
    real = kernels.swiglu
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: real(gate, up).mul_(3))
    with torch.no_grad():
        assert ways._engine.difference(PROMPTS[0], "sdpa") > 0.1


def test_without_the_loops_torch_answers(monkeypatch):
    noted = switch(monkeypatch, loops=False)
    monkeypatch.setattr(kernels, "_spread", lambda *given: pytest.fail("a loop was used"))
    monkeypatch.setattr(attention, "grouped", lambda *given: pytest.fail("the loops' attention was used"))
    ways = generator(tiny_model("llama", dtype=torch.bfloat16).eval())
    assert len(tokens_of(ways.generate(PROMPTS, max_new_tokens=3))) == len(PROMPTS)
    assert ways.notes == noted


def test_a_soft_cap_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(attention, "grouped", lambda *given: pytest.fail("the loops' attention was used"))
    steps = counting(monkeypatch, "attend_step")
    ways = generator(tiny_model("gemma2", dtype=torch.bfloat16).eval())
    assert len(ways.generate(PROMPTS, max_new_tokens=3)) == len(PROMPTS)
    assert not steps


def wrong_softmax(*given) -> None:
    real_softmax(*given)
    given[0].mul_(1.5)


real_softmax = kernels.softmax


def test_an_attention_that_computes_something_else_is_not_taken_and_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "softmax", wrong_softmax)
    ways = generator(tiny_model("llama", dtype=torch.bfloat16).eval())
    ways.generate(PROMPTS, max_new_tokens=1)
    assert not ways._engine.loops
    assert ways.notes == [
        "LlamaForCausalLM: answers come without the compiled loops, which is slower: their attention: it computes something else"
    ]


def test_layers_that_disagree_on_the_first_prompt_cost_the_loops_and_not_the_engine(monkeypatch):
    model, real = tiny_model("llama", dtype=torch.bfloat16).eval(), kernels.swiglu
    monkeypatch.setattr(fused, "_agrees", lambda *given: True)
    monkeypatch.setattr(fused, "agrees_in_miniature", lambda *given: True)
    monkeypatch.setattr(kernels, "swiglu", lambda gate, up: real(gate, up).mul_(30))
    ways = generator(model)
    ways.generate(PROMPTS, max_new_tokens=1)
    assert ways._engine is not None
    assert not ways._engine.loops
    (note,) = ways.notes
    assert "without the compiled loops" in note
    assert "its logits differ" in note


@pytest.mark.parametrize("before_the_first_answer", [True, False])
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_policy_that_went_back_to_plain_layers_samples_with_them(monkeypatch, name, before_the_first_answer):
    policy = Policy(attach(loaded(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()), method(METHOD_CASES[name]), seed=0))
    ways = generator(policy.model)
    if not before_the_first_answer:
        ways.generate(PROMPTS, max_new_tokens=1)
        assert ways._engine.loops
    policy.make_plain()
    compared = counting(monkeypatch, "difference", Engine)
    ways.generate(PROMPTS[:3], max_new_tokens=1)
    assert len(compared) == 1, "what samples now was never held against the model"
    (note,) = ways.notes
    assert note.endswith("without the compiled loops, which is slower: " + KEPT_PLAIN)
    monkeypatch.setattr(kernels, "_spread", lambda *given: pytest.fail("a loop was used"))
    ways.generate(PROMPTS, max_new_tokens=3)


def test_another_threads_batch_never_gets_this_ones_blocks():
    """Between the look at what is kept and the taking of it, another thread may put its own there."""
    mine, others = (Node(0, 40, ()),), (Node(0, 400, ()),)

    class Between(list):
        def __getitem__(self, place):
            held = super().__getitem__(place)
            super().__setitem__(0, (others, {4: groups_of(others, 4)}))
            return held

    grouped_module._last[:] = [(mine, {})]
    kept, grouped_module._last = grouped_module._last, Between([(mine, {})])
    try:
        assert grouped_module._kept(mine, 4)[0].queries_Bn.max() < 40
    finally:
        grouped_module._last = kept
