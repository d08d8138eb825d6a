"""Pushing to a hub, a stand-in of which runs on loopback: what arrives is what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tests.export.hub import Hub, serving

TOKEN = "hf_" + "x" * 20


@pytest.fixture
def hub():
    with serving(Hub(TOKEN)) as served:
        yield served


def push(run, hub: Hub, *words: str, token: str | None = TOKEN, home) -> subprocess.CompletedProcess:
    """The command line, in a process of its own: the endpoint is read when the hub's client is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-m", "tunesmith.cli", "export", str(run), *words, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_file_of_the_export_arrives_in_a_private_repository(train, hub, tmp_path):
    done = push(train({"type": "lora", "r": 4}), hub, "--push", "me/tickets", "--out", str(tmp_path / "merged"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == f"{hub.address}/me/tickets"
    written = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    assert hub.repositories["me/tickets"] == written
    assert hub.private == {"me/tickets": True}


def test_a_refusal_is_told_in_the_hubs_words_and_the_folder_stays(train, hub, tmp_path):
    hub.refuse = 403
    done = push(train({"type": "lora", "r": 4}), hub, "--push", "me/tickets", "--out", str(tmp_path / "merged"), home=tmp_path)
    assert done.returncode == 2
    assert "the hub refused it" in done.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert hub.repositories == {}


def test_without_a_token_nothing_is_begun(train, hub, tmp_path):
    done = push(train({"type": "lora", "r": 4}), hub, "--push", "me/tickets", "--out", str(tmp_path / "merged"), token=None, home=tmp_path)
    assert done.returncode == 2
    assert "HF_TOKEN" in done.stderr
    assert not (tmp_path / "merged").exists()
