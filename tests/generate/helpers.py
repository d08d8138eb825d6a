"""What the generation tests share: a stand-in tokenizer for tiny vocabularies, prompts with a common prefix, a plain full forward."""

from __future__ import annotations

import numpy as np
import torch

from tunesmith.generate import LocalGenerator

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
ANSWERS = [list(range(1, 2 + i)) for i in range(11)]


class NumberTokenizer:
    """Decodes token ids to their numbers; only what generation asks of a tokenizer."""

    def __init__(self, eos_token_id=None):
        self.eos_token_id = eos_token_id

    def decode(self, ids, **_):
        return " ".join(str(token) for token in ids)


def prompts_with_prefix(count, *, prefix=12, longest=9, vocabulary=97, seed=0):
    """Prompts that share their first tokens, of unlike lengths, in no order of length; token 0 (the end token) is not among them."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(1, vocabulary, prefix).tolist()
    return [shared + rng.integers(1, vocabulary, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def plain_logits(model, ids):
    """Logits [T, V] of one row alone by the model's own full forward."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def plain_greedy(model, prompt, tokens, stop=()):
    """Greedy tokens by a full forward for every token."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def generator(model, **settings):
    return LocalGenerator(model, NumberTokenizer(), **settings)


def tokens_of(generations):
    return [generation.token_ids for generation in generations]


def reference_logprobs(model, prompt, answer):
    logprobs = plain_logits(model, prompt + answer)[len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs[range(len(answer)), answer].numpy()
