"""A result's folder, whether an adapter or a whole model: what kind it is, its card, and whether its bytes are those that were saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import AdapterError, CheckpointError
from ..recipe import RopeScaling
from ..rundir import MANIFEST, verify_folder

CARD = "tunesmith.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def is_model(folder: Path) -> bool:
    """Whether a folder holds a result: an adapter, or a whole model with its weights."""
    return is_adapter(folder) or ((folder / "config.json").is_file() and any(folder.glob("model*.safetensors")))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's `adapter_config.json`. Raises AdapterError where it is damaged."""
    return _read_object(folder, ADAPTER_CONFIG)


def read_card(folder: Path) -> dict[str, Any]:
    """A result's `tunesmith.json`; empty for an adapter or model that another tool wrote. Raises AdapterError where it is damaged."""
    return _read_object(folder, CARD) if (folder / CARD).is_file() else {}


def scaling_of(folder: Path) -> RopeScaling | None:
    """The scaling of positions that an adapter's base needs. Raises AdapterError where the card tells of none that there is."""
    held = read_card(folder).get("rope_scaling")
    try:
        return held and RopeScaling(**held)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{CARD} is damaged: rope_scaling is {held}", where=str(folder), mend="take an intact copy") from error


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    mend = "train it again, or take an intact copy"
    try:
        held = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{name} is damaged: {error}", where=str(folder), mend=mend) from error
    if not isinstance(held, dict):
        raise AdapterError(f"{name} is damaged: it is no JSON object", where=str(folder), mend=mend)
    return held


def require_unaltered(folder: Path) -> None:
    """Checks every file of a result against the manifest it was saved with. Raises CheckpointError, naming the file.

    A folder with neither manifest nor card was written by another tool, and there is nothing to check it against.
    """
    if not (folder / MANIFEST).is_file() and not (folder / CARD).is_file():
        return
    try:
        verify_folder(folder.resolve())
    except CheckpointError as error:
        mend = error.mend or "train it again, or take an intact copy: it is not what was saved"
        raise CheckpointError(error.what, where=str(folder), mend=mend) from error
