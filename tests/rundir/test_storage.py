"""The writing functions: what they write, what they refuse, what they leave."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import numpy
import pytest

from tunesmith.errors import CheckpointError, StorageFailed
from tunesmith.rundir import (
    Storage,
    _storage,
    atomic_folder,
    make_folder,
    remove_folder,
    storage,
    storage_failures,
    sweep,
    verify_folder,
    write_bytes,
    write_json,
    write_text,
)
from tunesmith.rundir._writer import follow, lead


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def fill_and_raise(folder: Path, data: bytes, error: BaseException) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "half").write_bytes(data)
        raise error


def test_a_file_is_written_with_the_folders_on_its_way_and_nothing_else_stays(tmp_path):
    write_bytes(tmp_path / "a" / "b" / "c.bin", b"\0\1")
    write_text(tmp_path / "a" / "d.txt", "né\n")
    assert names(tmp_path) == ["a", "a/b", "a/b/c.bin", "a/d.txt"]
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"\0\1"
    assert (tmp_path / "a" / "d.txt").read_bytes() == b"n\xc3\xa9\n"


def test_the_files_of_a_folder_can_be_read_by_whom_the_umask_lets_whoever_wrote_them(tmp_path):
    with atomic_folder(tmp_path / "made") as temporary:
        (temporary / "weights").write_bytes(b"\0")
        (temporary / "weights").chmod(0o600)
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in (tmp_path / "made").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_write_that_the_system_cuts_short_goes_on_until_all_is_written(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:7])))
    write_bytes(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_a_file_is_replaced_and_a_reader_of_the_old_one_is_not_disturbed(tmp_path):
    write_text(tmp_path / "f", "old")
    with open(tmp_path / "f") as reader:
        write_text(tmp_path / "f", "new")
        assert reader.read() == "old"
    assert (tmp_path / "f").read_text() == "new"


def test_a_link_at_the_place_of_a_file_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "f").symlink_to(outside)
    write_text(tmp_path / "f", "ours")
    assert outside.read_text() == "mine"
    assert not (tmp_path / "f").is_symlink()


def test_json_holds_what_runs_are_made_of_and_says_what_is_not_finite(tmp_path):
    @dataclasses.dataclass
    class Identity:
        name: str
        folder: Path

    value = {
        "identity": Identity("m", Path("x/y")),
        "numbers": (1, numpy.float32(0.5), numpy.int64(3), True, None),
        "array": numpy.arange(2),
        "labels": {"b", "a"},
        "loss": [float("nan"), float("inf"), numpy.float32("-inf")],
        1: "é",
    }
    write_json(tmp_path / "f.json", value)
    text = (tmp_path / "f.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "identity": {"name": "m", "folder": "x/y"},
        "numbers": [1, 0.5, 3, True, None],
        "array": [0, 1],
        "labels": ["a", "b"],
        "loss": ["NaN", "Infinity", "-Infinity"],
        "1": "é",
    }
    assert text.endswith("\n")


def test_json_of_something_else_is_a_type_error_and_leaves_the_file(tmp_path):
    write_json(tmp_path / "f.json", 1)
    with pytest.raises(TypeError, match="object cannot be written"):
        write_json(tmp_path / "f.json", {"a": object()})
    assert (tmp_path / "f.json").read_text() == "1\n"


def test_a_path_that_leads_through_a_file_is_a_storage_failure(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageFailed, match="Not a directory"):
        write_text(tmp_path / "file" / "sub" / "f", "x")


def test_a_full_disk_is_told_with_the_bytes_that_are_needed(tmp_path, monkeypatch):
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(StorageFailed) as failure:
        write_bytes(tmp_path / "f", bytes(2_500_000))
    assert "free more than 2.5 MB on the file system of " + str(tmp_path) in failure.value.mend
    assert "run the same command again (a run goes on with --resume)" in failure.value.mend  # other verbs have no such option
    assert "No space left on device" in failure.value.what
    assert names(tmp_path) == []


def test_an_error_without_a_number_is_a_storage_failure_too(tmp_path):
    with pytest.raises(StorageFailed), storage_failures(tmp_path):
        raise OSError("odd")


def test_a_folder_appears_with_a_manifest_of_all_its_files(tmp_path):
    final = tmp_path / "deep" / "model"
    with atomic_folder(final) as temporary:
        assert not final.exists()
        (temporary / "sub").mkdir()
        (temporary / "sub" / "é.txt").write_text("abc")
        (temporary / "empty").write_bytes(b"")
    assert json.loads((final / "manifest.json").read_text()) == {
        "files": {
            "empty": {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
            "sub/é.txt": {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        }
    }
    verify_folder(final)
    assert names(tmp_path / "deep") == ["model", "model/empty", "model/manifest.json", "model/sub", "model/sub/é.txt"]


def test_a_folder_that_has_the_name_is_replaced_as_a_whole(tmp_path):
    for name in ("old", "new"):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / name).write_text(name)
    verify_folder(tmp_path / "f")
    assert names(tmp_path) == ["f", "f/manifest.json", "f/new"]


def test_a_block_that_raises_leaves_the_old_folder_and_nothing_else(tmp_path):
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("a")
    with pytest.raises(KeyboardInterrupt):
        fill_and_raise(tmp_path / "f", b"b", KeyboardInterrupt())
    assert names(tmp_path) == ["f", "f/a", "f/manifest.json"]


def test_an_error_of_the_block_that_is_not_the_disks_keeps_its_type(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "f"):
        (tmp_path / "missing").read_text()
    with pytest.raises(ValueError, match="os error 2"), atomic_folder(tmp_path / "f"):
        raise ValueError("no such file (os error 2)")


def test_a_full_disk_that_a_library_reports_in_its_own_type_is_a_storage_failure(tmp_path):
    class LibraryError(Exception):
        pass

    error = LibraryError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StorageFailed, match="No space left") as failure:
        fill_and_raise(tmp_path / "f", bytes(3000), error)
    assert "free more than 3.0 kB" in failure.value.mend
    assert names(tmp_path) == []


def test_a_full_disk_is_named_in_a_process_that_writes_its_part_into_anothers_folder(tmp_path):
    follow(tmp_path)
    try:
        with pytest.raises(StorageFailed, match="No space left"), atomic_folder(tmp_path / "f"):
            raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    finally:
        lead(tmp_path)


def test_a_link_is_not_sealed_into_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="link is a link"), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "link").symlink_to("/etc/hostname")
    assert names(tmp_path) == []


def test_a_file_named_as_the_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json"), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]\n",
        b"null\n",
        b"{}",
        b'{"files": []}',
        b'{\n "files": {\n  "../../etc/passwd": 1\n }\n}\n',
        b"\xff",
        b"[" * 100_000,
        b'{\n "files": {}\n}\n{',
    ],
)
def test_a_manifest_of_another_shape_is_a_checkpoint_error(manifest, tmp_path):
    (tmp_path / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointError, match="manifest"):
        verify_folder(tmp_path)


def test_a_manifest_cannot_make_verification_read_outside_the_folder(tmp_path):
    content = {"files": {"../outside": {"bytes": 1, "sha256": "0" * 64}}}
    folder = tmp_path / "f"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    (folder / "manifest.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="outside is missing"):
        verify_folder(folder)


def test_a_missing_folder_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        verify_folder(tmp_path / "nothing")


def test_a_file_that_cannot_be_read_is_a_checkpoint_error(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("a")

    def unreadable(self: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        verify_folder(tmp_path / "f")


def test_sweeping_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    temporary = ".tmp-" + "0" * 32
    kept = [".tmp-mine", "stages/.hidden", "stages/step-1/.tmp-" + "0" * 31]
    for name in [*kept, temporary, f"stages/{temporary}", f"stages/step-1/{temporary}"]:
        write_text(tmp_path / name, "x")
    make_folder(tmp_path / "model" / temporary.replace("0", "1") / "sub")
    write_text(tmp_path / ".replaced-model" / "f", "x")
    write_text(tmp_path / ".replaced-lost" / "f", "x")
    sweep(tmp_path)
    assert names(tmp_path) == sorted([*kept, "stages", "stages/step-1", "model", "lost", "lost/f"])


def test_sweeping_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    write_text(outside / (".tmp-" + "0" * 32), "x")
    make_folder(tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to(outside)
    sweep(tmp_path / "run")
    assert len(names(outside)) == 1


def test_a_removed_folder_is_gone(tmp_path):
    write_text(tmp_path / "f" / "a" / "b", "x")
    remove_folder(tmp_path / "f")
    assert names(tmp_path) == []


def test_each_call_that_changes_the_disk_is_one_method_of_the_storage():
    operations = {name for name in vars(Storage) if not name.startswith("_")}
    assert operations == {"open", "write", "fsync", "truncate", "rename", "mkdir", "unlink", "rmtree"}
    assert type(storage) is Storage


def test_no_other_line_of_the_package_changes_the_disk():
    package = Path(_storage.__file__).parent
    calls = "rename|replace|mkdir|makedirs|fsync|write|unlink|remove|ftruncate"
    changing = re.compile(rf"\b(?:os\.(?:{calls})|shutil\.\w*|\.write_(?:text|bytes))\(")
    found = {(file.name, call) for file in package.glob("*.py") for call in changing.findall(file.read_text())}
    expected = ("os.write(", "os.fsync(", "os.ftruncate(", "os.rename(", "os.mkdir(", "os.unlink(", "shutil.rmtree(", "shutil.disk_usage(")
    assert found == {("_storage.py", call) for call in expected}
    text = Path(_storage.__file__).read_text()
    assert [text.count(call) for call in expected] == [1] * len(expected)
