"""What the generation tests share: a stand-in tokenizer for tiny vocabularies, prompts with a common prefix, a plain full forward."""

from __future__ import annotations

import numpy as np
import torch


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
