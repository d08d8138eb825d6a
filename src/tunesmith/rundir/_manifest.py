"""The run's manifest: all that is needed to say what was run, with what, on what.

Takes the recipe, the model's identity, the data's hashes and the seeds; gives a dict for manifest.json. Versions are read from the
installed packages' metadata, so that nothing is imported; a figure that cannot be had is null, and none of this can stop a run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ._redact import redact
from ._storage import plain

PACKAGES = (
    "tunesmith",
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "jinja2",
    "xgrammar",
    "scikit-learn",
)
_GIT_SECONDS = 5.0  # a git that hangs on a slow file system must not hold the run up
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm


def manifest(
    recipe_dict: Mapping[str, Any], model_identity: Any, data_hashes: Mapping[str, str], seeds: Mapping[str, int]
) -> dict[str, Any]:
    """What manifest.json holds; secrets are taken out of every string, and no environment value goes in.

    model_identity: a data class or mapping (name, sha256, ...). data_hashes: file to sha256. seeds: use to seed.
    recipe_sha256 is of the recipe as it stands here, secrets out, as JSON with sorted keys and no spaces.
    """
    recipe = redact(plain(recipe_dict))
    packed = json.dumps(recipe, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "git": _git(Path.cwd()),
        "hardware": _hardware(),
        "seeds": plain(seeds),
        "model": redact(plain(model_identity)),
        "data": redact(plain(data_hashes)),
        "recipe": recipe,
        "recipe_sha256": hashlib.sha256(packed.encode("utf-8")).hexdigest(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """The commit of the folder's repository and whether tracked files differ from it; None where there is none or no git."""
    commit = _run_git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _run_git(folder, "-c", "core.fsmonitor=false", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _run_git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=folder,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    """Processor, cores (all, and those this process may use), memory in bytes, bf16 in hardware, GPUs (None: not looked at)."""
    model, flags = _processor(Path("/proc/cpuinfo"))
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "bf16": None if flags is None else bool(flags & _BF16_FLAGS),
        "gpus": _gpus(),
    }


def _processor(cpuinfo: Path) -> tuple[str | None, set[str] | None]:
    """The first processor's name and its flags, from Linux's cpuinfo; None for what is not there."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags", fields.get("features"))
    return fields.get("model name"), None if flags is None else set(flags.split())


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _gpus() -> list[str] | None:
    """The names of the GPUs if torch was imported before; this module does not import it."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError, AttributeError):  # no driver, a build without CUDA, or torch half imported
        return None
