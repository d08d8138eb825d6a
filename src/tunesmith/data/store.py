"""The token store: rendered examples on disk, memory-mapped, so that data may exceed memory and are rendered once.

Takes (row id, rendered example) pairs as a stream; gives each example's ids and weights as views of the files. A store is a folder
that is complete or absent (run.atomic_folder): tokens.int32.bin, weights.float32.bin, offsets.npy (int64[N + 1]),
rows.json and key.json. The key says what the store was made from: the data, the settings, the template, the tokenizer and the
renderer's own source; a store with another key is not opened but built anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..rundir import atomic_folder, storage, verify_folder, write_bytes, write_json
from .render import Rendered
from .template import ChatTemplate

RENDERER_FILES = (
    *("_encode.py", "_marks.py", "_spans.py", "_template_child.py", "items.py", "preference.py", "records.py"),
    *("render.py", "store.py", "template.py"),
)
RENDERER_LIBRARIES = ("jinja2", "tokenizers", "transformers")
BUFFER_BYTES = 4 * 2**20  # of one file, between writes

Example = tuple[str, Rendered]


def store_key(source_sha256: str, settings: dict[str, Any], template: ChatTemplate | None, tokenizer: Any) -> dict[str, Any]:
    """What a store depends on, as plain values. settings: every setting that decides the tokens or which rows there are."""
    here = Path(__file__).parent
    code = hashlib.sha256(b"\0".join((here / name).read_bytes() for name in RENDERER_FILES)).hexdigest()
    tokens = json.dumps([tokenizer.backend_tokenizer.to_str(), sorted(tokenizer.special_tokens_map.items())])
    return {
        "source": source_sha256,
        "settings": settings,
        "template": template.sha256 if template else None,
        "tokenizer": hashlib.sha256(tokens.encode()).hexdigest(),
        "renderer": code,
        "libraries": {name: importlib.metadata.version(name) for name in RENDERER_LIBRARIES},
    }


class TokenStore:
    """Rendered examples by position. row_ids: list of N. lengths: int64[N]."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._offsets = _load(folder / "offsets.npy")
        self.row_ids: list[str] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        self.lengths = np.diff(self._offsets)
        self._ids = _map(folder / "tokens.int32.bin", np.int32)
        self._weights = _map(folder / "weights.float32.bin", np.float32)

    @classmethod
    def build(cls, examples: Iterable[Example], folder: Path, key: dict[str, Any]) -> TokenStore:
        """Writes the examples, one at a time as they come; whatever stood in `folder` is replaced once all are there.

        Raises StorageFailed where the disk refuses, and what the stream raises; then nothing changes.
        """
        folder = Path(folder)
        with atomic_folder(folder) as temporary:
            offsets, row_ids = array("q", [0]), []
            with _Writer(temporary / "tokens.int32.bin") as ids, _Writer(temporary / "weights.float32.bin") as weights:
                for row_id, rendered in examples:
                    ids.add(np.ascontiguousarray(rendered.ids, dtype=np.int32))
                    weights.add(np.ascontiguousarray(rendered.weights, dtype=np.float32))
                    offsets.append(offsets[-1] + len(rendered.ids))
                    row_ids.append(row_id)
            _save(temporary / "offsets.npy", np.array(offsets, dtype=np.int64))
            write_json(temporary / "rows.json", row_ids)
            write_json(temporary / "key.json", key)
        return cls(folder)

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any]) -> TokenStore:
        """The store in a folder, checked byte by byte. Raises CheckpointError where it is missing, damaged, or made from something else."""
        folder = Path(folder)
        verify_folder(folder)
        made_from = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(key))
        if changed := sorted(name for name in {*made_from, *wanted} if made_from.get(name) != wanted.get(name)):
            raise CheckpointError(
                f"the token store was made from another {' and '.join(changed)}", where=str(folder), mend="build it anew from the data"
            )
        return cls(folder)

    @classmethod
    def open_or_build(cls, examples: Callable[[], Iterable[Example]], folder: Path, key: dict[str, Any]) -> tuple[TokenStore, str | None]:
        """The store in a folder, built anew where it cannot be used; and why it was, None if it was opened."""
        try:
            return cls.open(folder, key), None
        except CheckpointError as error:
            return cls.build(examples(), folder, key), error.what

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32[T], weights float32[T]) of one example: views of the files, read-only."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, stop = self._offsets[index % len(self)], self._offsets[index % len(self) + 1]
        return self._ids[start:stop], self._weights[start:stop]


class _Writer:
    """Appends arrays to a file in large writes."""

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.pending: list[bytes] = []

    def __enter__(self) -> _Writer:
        self.descriptor = storage.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        return self

    def add(self, values: np.ndarray) -> None:
        self.pending.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
        self.size += len(self.pending[-1])
        if self.size >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        storage.write(self.descriptor, b"".join(self.pending))
        self.pending, self.size = [], 0

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            os.close(self.descriptor)


def _save(path: Path, values: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_bytes(path, content.getvalue())


def _load(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _map(path: Path, kind: type) -> np.ndarray:
    dtype = np.dtype(kind).newbyteorder("<")
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
