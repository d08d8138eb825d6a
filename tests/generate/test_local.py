"""LocalGenerator against the plain model: same tokens, same log-probabilities, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GraniteConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.families import FAMILIES, tiny_model
from tests.generate.helpers import (
    ANSWERS,
    SMALL,
    NumberTokenizer,
    generator,
    plain_greedy,
    plain_logits,
    prompts_with_prefix,
    reference_logprobs,
    tokens_of,
)
from tunesmith.errors import ModelError, NonFinite
from tunesmith.generate import GREEDY, LocalGenerator, Sampling, attention, batch_disagreement, cache, engine


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_transformers_generate_for_every_family(family):
    model, prompts = tiny_model(family), prompts_with_prefix(11)
    ours = generator(model, batch_size=8)
    expected = []
    for prompt in prompts:
        config = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=0, pad_token_id=0)
        ids = torch.tensor([prompt])
        theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append(theirs[0, len(prompt) :].tolist())
    assert tokens_of(ours.generate(prompts, max_new_tokens=14)) == expected
    assert ours.notes == []


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_those_of_a_plain_full_forward_for_every_family(family):
    model, prompts = tiny_model(family), prompts_with_prefix(11)
    ours = generator(model, batch_size=4)
    for scores, prompt, answer in zip(ours.logprobs(prompts, ANSWERS), prompts, ANSWERS, strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, reference_logprobs(model, prompt, answer), atol=1e-5, rtol=1e-6)
    assert ours.notes == []


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "opt"])
def test_attention_taken_in_many_small_blocks_gives_the_same(family, monkeypatch):
    model, prompts = tiny_model(family), prompts_with_prefix(11)
    whole = generator(model).logprobs(prompts, ANSWERS)
    tokens = tokens_of(generator(model).generate(prompts, max_new_tokens=12))
    monkeypatch.setattr(cache, "SCORE_ELEMENTS_CPU", 4 * 64)  # two or three queries of one row at once
    for scores, expected in zip(generator(model).logprobs(prompts, ANSWERS), whole, strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert tokens_of(generator(model).generate(prompts, max_new_tokens=12)) == tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "opt"])
def test_keys_filled_up_to_few_shapes_give_the_same(family, monkeypatch):
    """As on a CPU in 16 bits, where each shape of a product is compiled."""
    model, prompts, shapes = tiny_model(family), prompts_with_prefix(11), set()
    whole = generator(model).logprobs(prompts, ANSWERS)
    tokens = tokens_of(generator(model).generate(prompts, max_new_tokens=40))
    right = attention._attend_block

    def noting(query_NHD, layer, block, end, *rest):
        shapes.add(end - block.first_key)
        return right(query_NHD, layer, block, end, *rest)

    monkeypatch.setattr(attention, "_attend_block", noting)
    generator(model).generate(prompts, max_new_tokens=40)
    many = len(shapes)
    shapes.clear()
    for module in (attention, cache):
        monkeypatch.setattr(module, "in_few_shapes", lambda like: True)
    ours = generator(model)
    assert tokens_of(ours.generate(prompts, max_new_tokens=40)) == tokens
    assert 0 < len(shapes) < many / 4
    for scores, expected in zip(ours.logprobs(prompts, ANSWERS), whole, strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert ours.notes == [], "it did not fall back on another engine"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_same_alone_and_in_a_batch_of_eight(family):
    model, prompts = tiny_model(family), prompts_with_prefix(8, seed=3)
    assert batch_disagreement(generator(model, batch_size=8), prompts, max_new_tokens=12) == 0.0


def test_batch_disagreement_counts_the_share_of_prompts_that_differ():
    class Unsteady:
        def generate(self, prompts, *, max_new_tokens):
            alone = len(prompts) == 1
            return [type("G", (), {"token_ids": [1 if alone and prompt == [3] else 2]}) for prompt in prompts]

    assert batch_disagreement(Unsteady(), [[1], [2], [3], [4]], max_new_tokens=1) == 0.25


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_mean_logprob_does_not_depend_on_the_batch_size(family):
    model, prompts = tiny_model(family), prompts_with_prefix(11)
    means = [
        np.concatenate(generator(model, batch_size=size).logprobs(prompts, ANSWERS)).astype(np.float64).mean() for size in (1, 2, 3, 8)
    ]
    alone = (
        np.concatenate([generator(model).logprobs([p], [a])[0] for p, a in zip(prompts, ANSWERS, strict=True)]).astype(np.float64).mean()
    )
    assert np.ptp([*means, alone]) <= 1e-6


def test_results_come_in_the_asked_order_whatever_the_lengths():
    model = tiny_model("llama")
    prompts = [[5] * n + [7] for n in (3, 19, 1, 11, 8)]
    assert tokens_of(generator(model, batch_size=2).generate(prompts, max_new_tokens=5)) == [
        plain_greedy(model, p, 5, {0}) for p in prompts
    ]


def test_each_token_of_a_shared_prefix_is_computed_once_and_no_padding_is():
    model, prompts = tiny_model("llama"), prompts_with_prefix(9, prefix=20)
    ours = generator(model, batch_size=4)
    ours.generate(prompts[:1], max_new_tokens=1)  # the check of the fast way is done
    seen = []
    hook = model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].numel()), with_kwargs=True)
    ours.generate(prompts, max_new_tokens=1)
    hook.remove()
    shared = engine.shared_prefix_length(prompts)
    assert shared == 20
    assert sum(seen) == 20 + sum(len(prompt) - 20 for prompt in prompts)


def test_a_prompt_that_is_the_beginning_of_another_keeps_a_token_outside_the_shared_prefix():
    model, long = tiny_model("llama"), prompts_with_prefix(1, prefix=20)[0]
    prompts = [long, long[:12], long, long[:12]]
    assert engine.shared_prefix_length(prompts) == 11
    assert tokens_of(generator(model).generate(prompts, max_new_tokens=6)) == [plain_greedy(model, p, 6, {0}) for p in prompts]
    for scores, prompt in zip(generator(model).logprobs(prompts, [[5, 6]] * 4), prompts, strict=True):
        np.testing.assert_allclose(scores, reference_logprobs(model, prompt, [5, 6]), atol=1e-5)


def test_the_head_runs_on_the_last_position_only_and_on_answer_positions_when_scoring():
    model, prompts = tiny_model("llama"), prompts_with_prefix(8)
    ours = generator(model, batch_size=8)
    ours.generate(prompts[:1], max_new_tokens=1)
    rows = []
    hook = model.lm_head.register_forward_pre_hook(lambda m, a: rows.append(a[0].shape[0]))
    ours.generate(prompts, max_new_tokens=1)
    ours.logprobs(prompts, ANSWERS[:8])
    hook.remove()
    assert rows == [8, sum(len(answer) for answer in ANSWERS[:8])]


def test_finished_rows_leave_the_batch_and_the_others_go_on_unchanged():
    model, prompts = tiny_model("llama", seed=1), prompts_with_prefix(8, seed=2)
    unstopped = [plain_greedy(model, prompt, 20) for prompt in prompts]
    said = {token for row in unstopped for token in row}
    stop = max(said, key=lambda t: len({row.index(t) for row in unstopped if t in row}))  # ends rows at different steps
    ours = generator(model, batch_size=8, stop_ids=[stop])
    ours.generate(prompts[:1], max_new_tokens=1)
    sizes = []
    hook = model.model.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].shape[0]), with_kwargs=True)
    generations = ours.generate(prompts, max_new_tokens=20)
    hook.remove()
    assert tokens_of(generations) == [plain_greedy(model, prompt, 20, {0, stop}) for prompt in prompts]
    steps = sizes[2:]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0]


def test_the_cache_grows_for_answers_longer_than_its_first_slots(monkeypatch):
    monkeypatch.setattr(engine, "FIRST_SLOTS", 3)
    monkeypatch.setattr(cache, "MIN_GROWTH", 2)
    model, prompts = tiny_model("qwen3"), prompts_with_prefix(5)
    assert tokens_of(generator(model).generate(prompts, max_new_tokens=30)) == [plain_greedy(model, p, 30, {0}) for p in prompts]


def test_a_batch_is_cut_where_its_tokens_are_too_many(monkeypatch):
    monkeypatch.setattr(engine, "BATCH_TOKENS", 30)
    assert list(engine.batches([10, 3, 12, 9, 31], 50)) == [[4], [2, 0], [3, 1]]
    assert list(engine.batches([1] * 51, 50)) == [list(range(26)), list(range(26, 51))]


def test_the_scoring_head_in_chunks_gives_the_same(monkeypatch):
    model, prompts = tiny_model("gemma2"), prompts_with_prefix(11)
    whole = generator(model).logprobs(prompts, ANSWERS)
    monkeypatch.setattr(engine, "LOGIT_ELEMENTS", 97 * 5)
    for scores, expected in zip(generator(model).logprobs(prompts, ANSWERS), whole, strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_an_empty_answer_has_no_logprobs_and_an_empty_call_no_results():
    ours = generator(tiny_model("llama"))
    assert [scores.shape for scores in ours.logprobs([[1, 2], [3]], [[], [4, 5]])] == [(0,), (2,)]
    assert ours.logprobs([], []) == []
    assert ours.generate([], max_new_tokens=3) == []


def test_stop_tokens_are_those_of_the_generation_config_the_tokenizer_and_the_caller():
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=[11, 12])
    assert LocalGenerator(model, NumberTokenizer(eos_token_id=13), stop_ids=[14]).stop_ids == {11, 12, 13, 14}


def test_an_answer_ends_with_its_stop_token_in_the_ids_and_not_in_the_text():
    model, prompt = tiny_model("llama"), [1, 2, 3]
    free = plain_greedy(model, prompt, 6)
    stop = free[2]
    assert stop not in free[:2]
    (stopped,) = generator(model, stop_ids=[stop]).generate([prompt], max_new_tokens=6)
    (cut,) = generator(model).generate([prompt], max_new_tokens=2)
    assert (stopped.token_ids, stopped.finish_reason) == (free[:3], "stop")
    assert stopped.text == " ".join(map(str, free[:2]))
    assert (cut.token_ids, cut.finish_reason) == (free[:2], "length")


@pytest.mark.parametrize("way", ["engine", "fallback"])
def test_nothing_of_a_poisoned_generation_config_leaks(way):
    prompts, model = prompts_with_prefix(6), tiny_model("llama")
    ours = generator(model)
    expected = [plain_greedy(model, prompt, 10, {0}) for prompt in prompts]
    poisoned = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=2, top_p=0.3, repetition_penalty=5.0, no_repeat_ngram_size=1, min_new_tokens=9,
        suppress_tokens=[row[0] for row in expected], forced_eos_token_id=3, eos_token_id=0, max_length=3,
    )  # fmt: skip
    model.generation_config = poisoned
    if way == "fallback":
        ours._checked = True  # without an engine
    sampling = Sampling(temperature=1.0, seed=5)
    assert tokens_of(ours.generate(prompts, max_new_tokens=10)) == expected
    assert tokens_of(ours.generate(prompts, max_new_tokens=10, sampling=sampling)) == tokens_of(
        generator(tiny_model("llama")).generate(prompts, max_new_tokens=10, sampling=sampling)
    )
    assert model.generation_config is poisoned


def test_samples_do_not_depend_on_batch_size_or_on_the_other_prompts():
    model, prompts = tiny_model("llama"), prompts_with_prefix(9)
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=40, seed=11)
    by_size = [tokens_of(generator(model, batch_size=s).generate(prompts, max_new_tokens=8, sampling=sampling)) for s in (1, 4, 9)]
    alone = [generator(model).generate([prompt], max_new_tokens=8, sampling=sampling)[0].token_ids for prompt in prompts]
    assert by_size[0] == by_size[1] == by_size[2] == alone
    assert by_size[0] != tokens_of(generator(model).generate(prompts, max_new_tokens=8, sampling=Sampling(1.3, 0.9, 40, seed=12)))


def test_equal_prompts_get_samples_of_their_own():
    generations = generator(tiny_model("llama")).generate([[1, 2, 3]] * 6, max_new_tokens=8, sampling=Sampling(temperature=1.5))
    assert len({tuple(generation.token_ids) for generation in generations}) > 1


def test_sampled_first_tokens_follow_the_models_distribution():
    model, prompt, draws = tiny_model("llama"), [4, 8, 15], 2000
    sampling = Sampling(temperature=3.0, seed=1)
    generations = generator(model, batch_size=500).generate([prompt] * draws, max_new_tokens=1, sampling=sampling)
    counts = np.bincount([generation.token_ids[0] for generation in generations], minlength=97)
    expected = (plain_logits(model, prompt)[-1] / 3.0).softmax(-1).numpy() * draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 96 + 4 * np.sqrt(2 * 96)  # mean and four deviations of chi-square with 96 degrees of freedom


def test_logit_scaling_named_in_the_config_is_honoured():
    config = GraniteConfig(**SMALL, logits_scaling=3.0, attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=2.0)
    torch.manual_seed(0)
    model, prompts = AutoModelForCausalLM.from_config(config).eval(), prompts_with_prefix(4)
    ours = generator(model)
    for scores, prompt, answer in zip(ours.logprobs(prompts, ANSWERS[:4]), prompts, ANSWERS, strict=False):
        np.testing.assert_allclose(scores, reference_logprobs(model, prompt, answer), atol=1e-5)
    assert ours.notes == []


def test_attention_settings_and_training_mode_come_back_even_after_an_error():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}

    def broken(*_):
        raise KeyboardInterrupt

    hook = model.lm_head.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        generator(model).generate([[1, 2, 3]], max_new_tokens=2)
    hook.remove()
    assert model.config._attn_implementation == "eager"
    assert {name: module.training for name, module in model.named_modules()} == before


def test_dropout_is_off_and_no_gradient_is_kept_while_generating():
    config = LlamaConfig(**SMALL, attention_dropout=0.9)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    twice = [generator(model).logprobs([[1, 2, 3]], [[4, 5, 6]])[0] for _ in range(2)]
    np.testing.assert_array_equal(*twice)


def test_an_adapter_model_generates_with_its_adapter():
    base, prompts = tiny_model("llama"), prompts_with_prefix(5)
    plain = tokens_of(generator(base).generate(prompts, max_new_tokens=8))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    ours = generator(model)
    adapted = tokens_of(ours.generate(prompts, max_new_tokens=8))
    assert adapted == [plain_greedy(model, prompt, 8, {0}) for prompt in prompts]
    assert adapted != plain
    assert ours.notes == []


def test_a_prompt_beyond_the_context_is_refused_and_one_near_it_is_cut_at_its_end():
    ours = generator(tiny_model("gpt2"))  # 128 positions
    with pytest.raises(ModelError, match="prompt 1: 128 tokens do not fit"):
        ours.generate([[1], [1] * 128], max_new_tokens=4)
    with pytest.raises(ModelError, match="prompt 0: the prompt has no tokens"):
        ours.generate([[]], max_new_tokens=4)
    with pytest.raises(ModelError, match="129 tokens do not fit"):
        ours.logprobs([[1] * 120], [[1] * 10])
    assert len(ours.logprobs([[1] * 120], [[1] * 9])[0]) == 9
    short, long = ours.generate([[1], [1] * 125], max_new_tokens=6)
    assert (len(long.token_ids), long.finish_reason) == (3, "length")
    assert len(short.token_ids) == 6


@pytest.mark.parametrize("kind", ["engine", "fallback"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_row_that_ended_with_the_context_does_not_go_on_beyond_it_beside_the_others(family, kind):
    model, prompts = tiny_model(family), [[5 + i % 40 for i in range(126)], *prompts_with_prefix(9)]  # of 128 learned positions
    ours = generator(model, batch_size=16)
    ours._checked = kind == "fallback"  # without an engine
    found = tokens_of(ours.generate(prompts, max_new_tokens=9))
    assert found == [plain_greedy(model, prompt, 9 if i else 2, {0}) for i, prompt in enumerate(prompts)]
    assert max(map(len, found[1:])) > 2


@pytest.mark.parametrize("kind", ["engine", "fallback"])
def test_weights_that_are_nan_are_an_error_and_not_an_answer(kind):
    model = tiny_model("llama")
    ours = generator(model)
    if kind == "fallback":
        ours._checked = True  # without an engine
    else:
        ours.generate([[1, 2]], max_new_tokens=1)
    with torch.no_grad():
        model.lm_head.weight[40] = float("nan")
    with pytest.raises(NonFinite):
        ours.generate([[1, 2]], max_new_tokens=1)
    with pytest.raises(NonFinite):
        ours.logprobs([[1, 2]], [[3, 4]])


def test_prompts_and_answers_may_be_arrays():
    model, prompts = tiny_model("llama"), prompts_with_prefix(4)
    ours, arrays = generator(model), [np.array(prompt, dtype=np.int32) for prompt in prompts]
    assert ours.generate(arrays, max_new_tokens=4) == ours.generate(prompts, max_new_tokens=4)
    scores = ours.logprobs(arrays, [np.array(answer, dtype=np.int32) for answer in ANSWERS[:4]])
    np.testing.assert_array_equal(np.concatenate(scores), np.concatenate(ours.logprobs(prompts, ANSWERS[:4])))


def test_bad_arguments_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="causal language model"):
        generator(T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)))
    with pytest.raises(ModelError, match="causal language model"):
        generator(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="batch_size"):
        generator(model, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generator(model).generate([[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match="1 prompts, 2 answers"):
        generator(model).logprobs([[1]], [[1], [2]])
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)
    assert Sampling(temperature=0) == GREEDY
