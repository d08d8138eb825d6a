"""Pushing to a hub, a stand-in of which runs on loopback: what arrives is what was written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
from tests.cli_tools import call
from tests.export.hub import Hub, serving

TOKEN = "hf_" + "x" * 20


@pytest.fixture
def hub():
    with serving(Hub(TOKEN)) as served:
        yield served


def push(run, hub: Hub, *words: str, home) -> subprocess.CompletedProcess:
    """The command line, in a process of its own: the endpoint is read when the hub's client is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "tunesmith", "export", str(run), *words, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_file_of_the_export_arrives_in_a_private_repository(train, hub, tmp_path):
    done = push(train({"type": "lora", "r": 4}), hub, "--push", "me/tickets", "--out", str(tmp_path / "merged"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == f"{hub.address}/me/tickets"
    written = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    assert hub.repositories["me/tickets"] == written
    assert hub.private == {"me/tickets": True}


@pytest.fixture
def here(hub, monkeypatch):
    """The client of this process asks the stand-in too."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return hub


def test_a_refusal_is_told_in_the_hubs_words_and_the_folder_stays(train, here, tmp_path):
    here.refuse = 403
    done = call("export", train({"type": "lora", "r": 4}), "--push", "me/tickets", "--out", tmp_path / "merged")
    assert done.status == 2
    assert "the hub refused it" in done.err
    assert str(tmp_path / "merged") in done.err
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert here.repositories == {}


@pytest.mark.parametrize("lost", ["the hub fails", "too many requests", "nobody listens"])
def test_a_hub_that_does_not_answer_is_a_failure_and_the_folder_stays(train, here, tmp_path, monkeypatch, lost):
    here.refuse = 429 if lost == "too many requests" else 500
    if lost == "nobody listens":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    done = call("export", train({"type": "lora", "r": 4}), "--push", "me/tickets", "--out", tmp_path / "merged")
    assert done.status == 1, done.err
    assert "the push failed" in done.err
    assert str(tmp_path / "merged") in done.err
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_without_a_token_nothing_is_begun(train, here, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = call("export", train({"type": "lora", "r": 4}), "--push", "me/tickets", "--out", tmp_path / "merged")
    assert done.status == 2
    assert "HF_TOKEN" in done.err
    assert not (tmp_path / "merged").exists()
