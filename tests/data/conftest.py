"""Fixtures of the data tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tunesmith.data.template import load_template


@pytest.fixture(scope="session")
def smollm2_template(smollm2_tokenizer):
    return load_template(smollm2_tokenizer, SimpleNamespace(chat_template=None))
