"""Writing what must last: files and folders that are complete or absent, whatever is killed, and that survive a power cut.

Takes paths and bytes; gives files and folders under their final names, a folder with a manifest of sha256 by which it is verified.
The protocol (as in Pillai et al. 2014, "All File Systems Are Not Created Equal"): write under a temporary name in the same folder,
fsync the data, rename, fsync the folder. What a killed writer left is removed by `sweep`, which only the holder of the run's lock
calls. Every failure of the disk becomes `StorageFailed`, which says what is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import CheckpointError, StorageFailed

from ._writer import is_writer

MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{32}")
_REPLACED = ".replaced-"
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG})
_REPLACE_ATTEMPTS = 3  # another process may put the same folder in place between our two renames


class Storage:
    """The calls that change the disk, one method each and nothing else; all raise OSError."""

    def open(self, path: Path, flags: int) -> int:
        """Open without following a link in the last part of the path; gives a file descriptor."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of the bytes."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def fsync(self, descriptor: int, path: Path) -> None:
        """Force a file's data, or a folder's entries, to the disk; path names what the descriptor is open on."""
        os.fsync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file to a size in bytes."""
        os.ftruncate(descriptor, size)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder its name in one step; a file that has it is replaced."""
        os.rename(source, target)

    def mkdir(self, path: Path) -> None:
        """Make one folder."""
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        """Remove one file."""
        os.unlink(path)

    def rmtree(self, path: Path) -> None:
        """Remove a folder and what is in it."""
        shutil.rmtree(path)


storage = Storage()


@contextlib.contextmanager
def storage_failures(where: Path, needed: int | None = None) -> Iterator[None]:
    """Turn every OSError of the block, which only changes the disk, into StorageFailed about `where`; needed: bytes, at least."""
    try:
        yield
    except OSError as error:
        raise _storage_failed(error.errno, where, needed) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that is whole or, if it fails, as it was before; folders on the way are made. Raises StorageFailed."""
    if not is_writer(path):
        return
    temporary = path.parent / _temporary_name()
    with storage_failures(path, len(data)):
        make_folder(path.parent)
        try:
            descriptor = storage.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                storage.write(descriptor, data)
                storage.fsync(descriptor, temporary)
            finally:
                os.close(descriptor)
            storage.rename(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                storage.unlink(temporary)
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON. Numbers that are not finite become the strings "NaN", "Infinity" and "-Infinity", since JSON
    has none and null would hide them."""
    write_text(path, json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold of a value: data classes, mappings, sequences, sets (sorted), paths and numbers of numpy or torch."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each entry on the disk before the next. Raises StorageFailed."""
    if not is_writer(path):
        return
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        with storage_failures(folder):
            with contextlib.suppress(FileExistsError):  # a process beside this one made it
                storage.mkdir(folder)
            sync(folder.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill leaves it whole or absent, never half. Raises StorageFailed."""
    if not is_writer(path):
        return
    doomed = path.parent / _temporary_name()
    with storage_failures(path):
        storage.rename(path, doomed)
        sync(path.parent)
        storage.rmtree(doomed)


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Write a folder that is complete or absent: yields a temporary folder beside `final` to be filled.

    At the end of the block every file is fsynced, manifest.json written ({"files": {path: {"sha256", "bytes"}}}), the folder renamed
    to `final` (one that has the name is replaced) and its parent fsynced: a power cut after the block loses nothing. If the block
    raises, nothing of it stays. Raises StorageFailed when the disk refuses, also where a library reports that in its own way.
    In a process that does not write there, what the block fills goes.
    """
    if not is_writer(final):
        with tempfile.TemporaryDirectory() as nowhere, _disk_failures_of_libraries(final, Path(nowhere)):
            yield Path(nowhere)
        return
    make_folder(final.parent)
    temporary = final.parent / _temporary_name()
    try:
        with storage_failures(final):
            storage.mkdir(temporary)
        with _disk_failures_of_libraries(final, temporary):
            yield temporary
        with storage_failures(final):
            _seal(temporary)
            _put_in_place(temporary, final)
    finally:
        if os.path.lexists(temporary):
            with contextlib.suppress(OSError):  # the error that brought us here is the one to report
                storage.rmtree(temporary)


def verify_folder(path: Path) -> None:
    """Check a folder written by `atomic_folder` against its manifest, byte by byte.

    Raises CheckpointError naming the file that is missing, added, of another length, altered or a link, or the manifest itself.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
        recorded = _read_manifest(raw, path)
        found = {name: file for name, file in _files(path) if name != MANIFEST}
        if missing := sorted(recorded.keys() - found.keys()):
            raise CheckpointError(f"the file {missing[0]} is missing", where=str(path))
        if added := sorted(found.keys() - recorded.keys()):
            raise CheckpointError(f"the file {added[0]} is not in its {MANIFEST}", where=str(path), mend="remove the file")
        for name, file in found.items():
            entry = recorded[name]
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"the file {name} has {size} bytes and not {entry['bytes']}", where=str(path))
            if _sha256(file) != entry["sha256"]:
                raise CheckpointError(f"the file {name} was altered: its sha256 is not the one recorded", where=str(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"the file {os.path.basename(error.filename or MANIFEST)} is missing", where=str(path)) from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}", where=str(path)) from error


def sweep(folder: Path) -> None:
    """Remove, in a folder and below, what killed writers left; bring back a folder whose replacement never came.

    Only for a caller that is the folder's one writer: what another process is writing would be removed. Raises StorageFailed.
    """
    with storage_failures(folder):
        for parent, folders, files in os.walk(folder):
            for name in [name for name in folders if is_temporary(name)]:
                storage.rmtree(Path(parent, name))
                folders.remove(name)
            for name in [name for name in files if is_temporary(name)]:
                storage.unlink(Path(parent, name))
            for name in [name for name in folders if name.startswith(_REPLACED)]:
                final = Path(parent, name.removeprefix(_REPLACED))
                if os.path.lexists(final):
                    storage.rmtree(Path(parent, name))
                else:
                    storage.rename(Path(parent, name), final)
                folders.remove(name)


def is_temporary(name: str) -> bool:
    """Whether a name is one that this module gives to what is not complete yet."""
    return _TEMPORARY.fullmatch(name) is not None


def _temporary_name() -> str:
    return f".tmp-{uuid.uuid4().hex}"


def sync(path: Path) -> None:
    """fsync a folder, or a file that a library wrote. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        storage.fsync(descriptor, path)
    finally:
        os.close(descriptor)


def _seal(folder: Path) -> None:
    """fsync all that a folder holds and write its manifest."""
    files = {}
    for name, file in _files(folder):
        if name == MANIFEST:
            raise ValueError(f"{MANIFEST} is written by atomic_folder; give your file another name")
        sync(file)
        files[name] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
    write_bytes(folder / MANIFEST, _canonical({"files": files}))
    mode = (folder / MANIFEST).stat().st_mode  # as the umask has it; safetensors lets only its owner read what it writes
    with contextlib.suppress(OSError):  # a file system without modes
        for name in files:
            os.chmod(folder / name, stat.S_IMODE(mode))
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename; a folder that has the name steps aside first, under a name from which `sweep` brings it back."""
    aside = final.parent / f"{_REPLACED}{final.name}"
    for attempt in range(_REPLACE_ATTEMPTS):
        try:
            storage.rename(temporary, final)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _REPLACE_ATTEMPTS - 1:
                raise
            if os.path.lexists(aside):
                storage.rmtree(aside)
            with contextlib.suppress(FileNotFoundError):  # a process beside this one moved it
                storage.rename(final, aside)
    sync(final.parent)
    if os.path.lexists(aside):
        storage.rmtree(aside)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path under the folder with /, path) of each file, in order. Raises CheckpointError for a link or a special file."""
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield path.relative_to(folder).as_posix(), path
        elif not stat.S_ISDIR(mode):
            name = path.relative_to(folder)
            raise CheckpointError(f"{name} is a link or a special file", where=str(folder), mend="put the file itself there")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode("utf-8")


def _read_manifest(raw: bytes, folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files. Its own bytes are checked by writing it again: a flip that changes no meaning changes the bytes."""
    try:
        content = json.loads(raw.decode("utf-8"))
        shaped = content.keys() == {"files"} and all(entry.keys() == {"sha256", "bytes"} for entry in content["files"].values())
        if shaped and _canonical(content) == raw:
            files: dict[str, dict[str, Any]] = content["files"]
            return files
    except (ValueError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"its {MANIFEST} is torn or altered", where=str(folder))


@contextlib.contextmanager
def _disk_failures_of_libraries(final: Path, temporary: Path) -> Iterator[None]:
    """safetensors and other libraries in Rust report a full disk as an error of their own that ends with "(os error 28)"."""
    try:
        yield
    except Exception as error:
        told = _RUST_OS_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(told.group(1)) if told else None
        if number not in _DISK_ERRORS:
            raise
        written = sum(file.lstat().st_size for file in temporary.rglob("*") if file.is_file())
        raise _storage_failed(number, final, written) from error


def _storage_failed(number: int | None, where: Path, needed: int | None) -> StorageFailed:
    folder = where
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    reason = os.strerror(number) if number else "it could not be written"
    mend = "write to another folder"
    if number in (errno.ENOSPC, errno.EDQUOT):
        size = f"more than {_in_units(needed)}" if needed else "some space"
        with contextlib.suppress(OSError):
            reason += f" ({_in_units(shutil.disk_usage(folder).free)} free)"
        mend = f"free {size} on the file system of {folder}, or {mend}"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        mend = f"make {folder} writable, or {mend}"
    elif number == errno.EIO:
        mend = f"check the disk that holds {folder} (the kernel's log names the fault), or {mend}"
    mend += "; then run the same command again (a run goes on with --resume)"
    return StorageFailed(f"the disk refused a write: {reason}; what was there before is intact", where=str(where), mend=mend)


def _in_units(size: int) -> str:
    """A number of bytes in the unit a person would use, decimal as disks are sold."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"
