"""The manifest: what it says, what it never says, and that nothing can stop it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tunesmith.rundir import _manifest, manifest, redact, write_json

LETTERS = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8bC0dF2hJ4lM6"

# 20 canaries, each in the form its issuer gives out, made of the letters above: none is anybody's.
CANARIES = {
    "Hugging Face": "hf_" + LETTERS[:34],
    "Hugging Face organisation": "api_org_" + LETTERS[:34],
    "OpenAI": "sk-" + LETTERS + "xY9wV7",
    "OpenAI project": "sk-proj-" + LETTERS[:20] + "_" + LETTERS[20:],
    "Anthropic": "sk-ant-api03-" + LETTERS,
    "AWS key id": "AKIA" + "IOSFODNN7TESTKEY",
    "AWS temporary key id": "ASIA" + "IOSFODNN7TESTKEY",
    "GitHub": "ghp_" + LETTERS[:36],
    "GitHub fine-grained": "github_pat_" + LETTERS[:22] + "_" + LETTERS,
    "GitLab": "glpat-" + LETTERS[:20],
    "Slack": "xoxb-" + "1234567890-" + LETTERS[:24],
    "Google": "AIza" + LETTERS[:35],
    "Google OAuth": "ya29." + LETTERS[:30],
    "npm": "npm_" + LETTERS[:36],
    "PyPI": "pypi-" + LETTERS + LETTERS[:10],
    "Groq": "gsk_" + LETTERS,
    "Stripe": "sk_live_" + LETTERS[:24],
    "JSON Web Token": "eyJhbGciOiJI." + "eyJzdWIiOiIx." + LETTERS[:30],
    "NVIDIA": "nvapi-" + LETTERS,
    "Replicate": "r8_" + LETTERS[:37],
}


def place(secret: str) -> dict[str, object]:
    """A recipe that carries a secret in every kind of place."""
    return {
        "name": "canary",
        "task": {"description": f"Call the tool with {secret}, then answer."},
        "data": {"train": f"https://user:{secret}@example.org/train.jsonl", "columns": {secret: "text", "prompt": f"x{secret[:0]}"}},
        "stages": [{"name": "sft", "note": [secret, (f"({secret})", {"deep": f"key={secret};"})]}],
    }


@pytest.mark.parametrize("issuer", CANARIES)
def test_a_canary_is_in_no_byte_of_the_artefact(issuer, tmp_path):
    secret = CANARIES[issuer]
    content = manifest(place(secret), {"name": f"owner/{secret}"}, {f"https://h/x?token={secret}": "0" * 64}, {"run": 0})
    write_json(tmp_path / "manifest.json", content)
    written = (tmp_path / "manifest.json").read_text()
    assert secret not in written
    assert secret[8:] not in written
    assert "***" in written
    assert secret in json.dumps(place(secret))  # the canary was there to be found


def test_there_are_twenty_canaries_and_none_is_like_another():
    assert len(set(CANARIES.values())) == 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abc.DEF-123_x/y==", "Authorization: Bearer ***"),
        ("basic dXNlcjpwYXNzd29yZA==", "basic ***"),
        ("https://me:pa55@host/x?a=1", "https://***@host/x?a=1"),
        ("https://ghostuser@host/x", "https://***@host/x"),
        ("s3://b/k?X-Amz-Signature=0123abcdef&x=1", "s3://b/k?X-Amz-Signature=***&x=1"),
        ("--set api_key=0123456789", "--set api_key=***"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfi", "aws_secret_access_key = ***"),
        ('{"password": "hunter2hunter2"}', '{"password": "***"}'),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_a_secret_is_taken_out_and_what_stands_around_it_stays(text, expected):
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Reset password: ask the customer for their order number",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709",
        "write to help@example.org",
        "https://example.org/a@b/c",
        "sk-learn, task-based, risk_free, disk-usage",
        "eos_token=<|im_end|> pad_token: <|endoftext|>",
        "recipes/helpdesk/train.jsonl",
    ],
)
def test_ordinary_text_stays_as_it_is(text):
    assert redact({"text": text}) == {"text": text}


def test_a_value_whose_name_says_secret_is_taken_out_and_special_tokens_and_numbers_are_not():
    value = {"apiKey": "x", "hf_token": "y", "password": "", "eos_token": "</s>", "max_new_tokens": 64, "tokenizer": "t", "token": None}
    assert redact(value) == {**value, "apiKey": "***", "hf_token": "***"}


def test_two_keys_that_differ_only_in_their_secret_are_both_kept():
    keys = {CANARIES["GitHub"]: 1, CANARIES["Groq"]: 2}
    assert sorted(redact(keys).values()) == [1, 2]


def test_the_value_of_a_secret_variable_is_taken_out_wherever_it_stands_and_none_is_recorded(monkeypatch):
    hexadecimal = "0123456789abcdef" * 2
    monkeypatch.setenv("WANDB_API_KEY", hexadecimal)
    monkeypatch.setenv("CANARY_VARIABLE", "canary-of-the-environment")
    monkeypatch.setenv("SHORT_TOKEN", "text")
    written = json.dumps(manifest({"task": {"description": f"a text with {hexadecimal}"}}, {}, {}, {}))
    assert hexadecimal not in written
    assert "canary-of-the-environment" not in written
    assert "a text with ***" in written


def test_redaction_changes_a_copy():
    value = {"a": ["hf_" + LETTERS]}
    assert redact(value) == {"a": ["***"]}
    assert value == {"a": ["hf_" + LETTERS]}


def test_it_names_versions_hardware_seeds_and_hashes():
    @dataclasses.dataclass
    class Identity:
        name: str
        sha256: str
        folder: Path

    content = manifest({"name": "x"}, Identity("m", "1" * 64, Path("models/m")), {"train.jsonl": "2" * 64}, {"order": 7})
    json.dumps(content, allow_nan=False)
    assert content["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["versions"]["transformers"].split(".")[0].isdigit()
    assert content["model"] == {"name": "m", "sha256": "1" * 64, "folder": "models/m"}
    assert content["data"] == {"train.jsonl": "2" * 64}
    assert content["seeds"] == {"order": 7}
    assert content["recipe"] == {"name": "x"}
    assert content["recipe_sha256"] == hashlib.sha256(b'{"name":"x"}').hexdigest()
    hardware = content["hardware"]
    assert hardware["cpu"]
    assert hardware["cores"] >= hardware["usable_cores"] >= 1
    assert hardware["memory_bytes"] > 10**8


def test_a_package_that_is_not_installed_is_null(monkeypatch):
    monkeypatch.setattr(_manifest, "PACKAGES", ("no-such-package-here",))
    assert manifest({}, {}, {}, {})["versions"]["no-such-package-here"] is None


@pytest.mark.parametrize(
    ("cpuinfo", "model", "bf16"),
    [
        ("model name\t: AMD EPYC\nflags\t\t: fpu avx512f avx512_bf16 sse\n", "AMD EPYC", True),
        ("model name\t: Intel(R) Xeon(R)\nflags\t\t: fpu amx_bf16\n", "Intel(R) Xeon(R)", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", None, True),
        ("model name\t: old\nflags\t\t: fpu avx2 avx512f\n", "old", False),
    ],
)
def test_the_processor_and_its_bf16_flag_are_read_from_cpuinfo(cpuinfo, model, bf16, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    processor = _manifest._processor
    monkeypatch.setattr(_manifest, "_processor", lambda path: processor(tmp_path / "cpuinfo"))
    hardware = manifest({}, {}, {}, {})["hardware"]
    assert hardware["bf16"] is bf16
    assert model is None or hardware["cpu"] == model


def test_where_there_is_no_cpuinfo_the_flag_is_unknown_and_not_false(tmp_path):
    assert _manifest._processor(tmp_path / "nothing") == (None, None)


def test_gpus_are_named_only_if_torch_was_imported_before(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert manifest({}, {}, {}, {})["hardware"]["gpus"] is None
    cuda = types.SimpleNamespace(device_count=lambda: 2, get_device_name=lambda index: f"GPU {index}")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    assert manifest({}, {}, {}, {})["hardware"]["gpus"] == ["GPU 0", "GPU 1"]


def test_a_driver_that_fails_stops_nothing(monkeypatch):
    def fail() -> int:
        raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=fail)))
    assert manifest({}, {}, {}, {})["hardware"]["gpus"] is None


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_the_current_folder_is_recorded_with_whether_files_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    (tmp_path / "f").write_text("1")
    git(tmp_path, "add", "f")
    git(tmp_path, "commit", "-q", "-m", "m")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert manifest({}, {}, {}, {})["git"] == {"commit": commit, "changed": False}
    (tmp_path / "f").write_text("22")
    assert manifest({}, {}, {}, {})["git"] == {"commit": commit, "changed": True}


def test_no_repository_no_commit_and_no_git_are_null(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest({}, {}, {}, {})["git"] is None
    git(tmp_path, "init", "-q")
    assert manifest({}, {}, {}, {})["git"] is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert manifest({}, {}, {}, {})["git"] is None


def test_a_git_that_hangs_is_given_up(tmp_path, monkeypatch):
    slow = tmp_path / "git"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(_manifest, "_GIT_SECONDS", 0.05)
    assert manifest({}, {}, {}, {})["git"] is None


def test_importing_and_using_the_package_imports_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, tunesmith.rundir as r; r.manifest({{}}, {{}}, {{}}, {{}}); sys.exit(bool({heavy} & set(sys.modules)))"
    source = str(Path(_manifest.__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, check=False).returncode == 0
