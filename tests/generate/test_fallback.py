"""Models that the engine does not know or disagrees with: served in the slow way, rightly, and said so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, Lfm2Config, LlamaConfig, MambaConfig

from tests.families import tiny_model
from tests.generate.helpers import ANSWERS, SMALL, generator, plain_greedy, prompts_with_prefix, reference_logprobs, tokens_of
from tunesmith.generate import cache

FOREIGN = {
    "recurrent": (lambda: MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4), "linear_attention"),
    "hybrid": (lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]), "conv"),
    "sinks": (lambda: GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=9), "s_aux"),
    "dynamic rotary": (lambda: LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rotary"),
}


def foreign_model(kind):
    config = FOREIGN[kind][0]()
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_layout_that_the_engine_does_not_know_is_served_by_transformers_and_noted(kind):
    model, prompts = foreign_model(kind), prompts_with_prefix(5)
    ours = generator(model, batch_size=3)
    with pytest.warns(UserWarning, match="falls back"):
        generations = ours.generate(prompts, max_new_tokens=6)
    assert tokens_of(generations) == [plain_greedy(model, prompt, 6, {0}) for prompt in prompts]
    for scores, prompt, answer in zip(ours.logprobs(prompts, ANSWERS[:5]), prompts, ANSWERS, strict=False):
        np.testing.assert_allclose(scores, reference_logprobs(model, prompt, answer), atol=1e-5)
    assert len(ours.notes) == 1
    assert FOREIGN[kind][1] in ours.notes[0]


def test_an_engine_that_disagrees_with_the_plain_model_is_dropped_with_a_warning(monkeypatch):
    model, prompts = tiny_model("llama"), prompts_with_prefix(3)
    positions = cache.PrefixCache.positions
    monkeypatch.setattr(cache.PrefixCache, "positions", lambda self: positions(self) + bool(self.layout.prefix))
    ours = generator(model)
    with pytest.warns(UserWarning, match="differ from the plain model's"):
        generations = ours.generate(prompts, max_new_tokens=5)
    assert tokens_of(generations) == [plain_greedy(model, prompt, 5, {0}) for prompt in prompts]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_tokens_on_a_layout_that_the_engine_does_not_know_say_what_their_forward_says(kind):
    model = get_peft_model(foreign_model("sinks"), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    prompts = prompts_with_prefix(3)

    def greedy(prompt):
        ids = list(prompt)
        for _ in range(5):
            row = torch.tensor([ids])
            with torch.no_grad():
                ids.append(int(model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        return ids[len(prompt) :]

    with pytest.warns(UserWarning, match="s_aux"):
        assert tokens_of(generator(model).generate(prompts, max_new_tokens=5)) == [greedy(prompt) for prompt in prompts]
