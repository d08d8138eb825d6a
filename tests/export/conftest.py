"""A tiny model and runs of it."""

from __future__ import annotations

import pytest
import torch
from tests.pipeline.helpers import recipe, stage
from tests.toys import model_folder

import tunesmith


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a Llama of 20,000 random weights, a tokenizer of one token a byte, and chatml as its template."""
    torch.set_num_threads(1)
    return model_folder(tmp_path_factory.mktemp("export") / "tiny-llama")


@pytest.fixture(scope="session")
def train(tiny, tmp_path_factory):
    """Trains a stage by a method; gives the run directory, one for each set of settings."""
    runs = {}

    def made(method: dict, **changed):
        key = repr((method, changed))
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            given = recipe(folder, tiny, stages=[stage(method=method, learning_rate=0.05)], **changed)
            runs[key] = tunesmith.train(given, out=folder / "run").path
        return runs[key]

    return made
