"""Fixtures of the data tests."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from tunesmith.data.template import load_template

MERGES = 4000


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_tokenizer):
    """The embedded model's tokenizer with its first merges, whose tokens are the vocabulary's last: a tenth of it, which is soon copied."""
    own = copy.deepcopy(smollm2_tokenizer)
    whole = json.loads(own.backend_tokenizer.to_str())
    model = whole["model"]
    size = len(model["vocab"]) - len(model["merges"]) + MERGES
    model["merges"] = model["merges"][:MERGES]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < size}
    own._tokenizer = Tokenizer.from_str(json.dumps(whole))
    return own


@pytest.fixture(scope="session")
def smollm2_template(smollm2_tokenizer):
    return load_template(smollm2_tokenizer, SimpleNamespace(chat_template=None))
