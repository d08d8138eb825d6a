"""The run directory, its lock, its event log, its manifest: the one package that writes what must last. No torch is imported here.

Takes a folder, gives a `RunDirectory`; every lasting write of the project goes through the one object `storage`, so that tests
can count its calls, make them fail, kill the process at any of them and replay a power cut.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder, RunDirectory.open(pathlib.Path(folder) / "run", resume=False) as run:
    ...     run.log({"stage": "sft", "step": 1, "loss": 2.5})
    ...     with run.checkpoint("sft", 1) as temporary:
    ...         _ = (temporary / "weights").write_bytes(b"1 2 3")
    ...     newest, refused = run.newest_valid_checkpoint("sft")
    ...     newest.name, refused, run.events()[0]["loss"]
    ('step-1', [], 2.5)
"""

from ._directory import RefusedCheckpoint, RunDirectory, refuse_in_use
from ._events import read_events
from ._lock import sole_writer
from ._manifest import manifest
from ._redact import redact
from ._storage import (
    MANIFEST,
    Storage,
    atomic_folder,
    make_folder,
    plain,
    remove_folder,
    storage,
    storage_failures,
    sweep,
    sync,
    verify_folder,
    write_bytes,
    write_json,
    write_text,
)
from ._writer import launched, rank, world

__all__ = [
    "MANIFEST",
    "RefusedCheckpoint",
    "RunDirectory",
    "Storage",
    "atomic_folder",
    "launched",
    "make_folder",
    "manifest",
    "plain",
    "rank",
    "read_events",
    "redact",
    "refuse_in_use",
    "remove_folder",
    "sole_writer",
    "storage",
    "storage_failures",
    "sweep",
    "sync",
    "verify_folder",
    "world",
    "write_bytes",
    "write_json",
    "write_text",
]
