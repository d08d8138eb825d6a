"""The tiny model that the pipeline's tests tune."""

from __future__ import annotations

import pytest
import torch
from tests.toys import model_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a Llama of 20,000 random weights, a tokenizer of one token a byte, and chatml as its template."""
    torch.set_num_threads(1)
    return model_folder(tmp_path_factory.mktemp("pipeline") / "tiny-llama")
