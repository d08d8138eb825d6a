"""The token store: complete or absent, read without loading, and built anew when anything it was made from changes."""

from __future__ import annotations

import copy
import errno
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tunesmith.data import store as store_module
from tunesmith.data.records import Message, Source, make_conversation
from tunesmith.data.render import Rendered, render_records
from tunesmith.data.store import TokenStore, store_key
from tunesmith.data.template import ChatTemplate, load_template
from tunesmith.errors import CheckpointError, StorageFailed
from tunesmith.rundir import storage

KEY = {"source": "a", "settings": {"max_length": None}}


def example(number, length=None):
    length = number % 7 if length is None else length
    ids = np.arange(number, number + length, dtype=np.int32)
    return f"r{number:012x}", Rendered(ids, (ids % 3).astype(np.float32), min(number % 5, length))


def test_every_example_comes_back_as_a_view_of_the_file(tmp_path):
    store = TokenStore.build((example(number) for number in range(100)), tmp_path / "store", KEY)
    reopened = TokenStore.open(tmp_path / "store", KEY)
    for one in (store, reopened):
        assert len(one) == 100
        for number in range(100):
            row_id, rendered = example(number)
            ids, weights = one[number]
            assert ids.tolist() == rendered.ids.tolist()
            assert weights.tolist() == rendered.weights.tolist()
            assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
            assert (one.row_ids[number], one.lengths[number]) == (row_id, len(ids))
        ids, weights = one[-1]
        assert ids.tolist() == example(99)[1].ids.tolist()
        assert isinstance(ids, np.memmap)
        assert not ids.flags.writeable
        with pytest.raises(IndexError):
            one[100]


def test_a_store_of_nothing_can_be_opened(tmp_path):
    TokenStore.build([], tmp_path / "store", KEY)
    assert len(TokenStore.open(tmp_path / "store", KEY)) == 0


def test_building_holds_one_example_and_one_buffer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "BUFFER_BYTES", 4000)
    sizes = []
    real = storage.write
    monkeypatch.setattr(storage, "write", lambda descriptor, data: (sizes.append(len(data)), real(descriptor, data)))
    TokenStore.build((example(number, 300) for number in range(1000)), tmp_path / "store", KEY)
    streamed = [size for size in sizes if size % 1200 == 0 and size]
    assert max(streamed) == 4800  # four rows of 300 tokens of 4 bytes
    assert sum(streamed) == 2 * 1000 * 300 * 4


def test_a_stream_that_fails_leaves_the_old_store(tmp_path):
    TokenStore.build([example(1)], tmp_path / "store", KEY)

    def broken():
        yield example(2)
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError):
        TokenStore.build(broken(), tmp_path / "store", KEY)
    assert TokenStore.open(tmp_path / "store", KEY).row_ids == [example(1)[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_full_disk_is_a_named_error_and_leaves_the_old_store(tmp_path, monkeypatch):
    TokenStore.build([example(1)], tmp_path / "store", KEY)

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write", full)
    with pytest.raises(StorageFailed):
        TokenStore.build([example(2)], tmp_path / "store", KEY)
    monkeypatch.undo()
    assert TokenStore.open(tmp_path / "store", KEY).row_ids == [example(1)[0]]


@pytest.mark.parametrize("name", ["tokens.int32.bin", "weights.float32.bin", "offsets.npy", "rows.json", "key.json"])
@pytest.mark.parametrize("damage", ["deleted", "truncated", "one bit flipped"])
def test_a_damaged_store_is_found_out_and_built_anew(name, damage, tmp_path):
    TokenStore.build((example(number) for number in range(20)), tmp_path / "store", KEY)
    file = tmp_path / "store" / name
    content = bytearray(file.read_bytes())
    if damage == "deleted":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError):
        TokenStore.open(tmp_path / "store", KEY)
    store, why = TokenStore.open_or_build(lambda: map(example, range(20)), tmp_path / "store", KEY)
    assert name in why
    assert store[13][0].tolist() == example(13)[1].ids.tolist()


def test_a_store_that_fits_is_not_built_again(tmp_path):
    def never():
        raise AssertionError("built again")

    first, why = TokenStore.open_or_build(lambda: [example(3)], tmp_path / "store", KEY)
    assert "missing" in why
    second, why = TokenStore.open_or_build(never, tmp_path / "store", copy.deepcopy(KEY))
    assert why is None
    assert second.row_ids == first.row_ids


@pytest.fixture
def made_from(smollm2_tokenizer):
    """What a store is made from: (source hash, settings, template, tokenizer), by name."""
    template = load_template(smollm2_tokenizer, SimpleNamespace(chat_template=None))
    return {"source_sha256": "a" * 64, "settings": {"train_on": "all"}, "template": template, "tokenizer": smollm2_tokenizer}


def test_anything_a_store_was_made_from_changes_its_key(made_from, tmp_path, monkeypatch):
    key = store_key(**made_from)
    assert key == store_key(**made_from)
    TokenStore.build([example(1)], tmp_path / "store", key)
    changed_tokenizer = copy.deepcopy(made_from["tokenizer"])
    changed_tokenizer.add_tokens(["<new>"])
    for part, change in {
        "source": {"source_sha256": "b" * 64},
        "settings": {"settings": {"train_on": "last"}},
        "template": {"template": ChatTemplate(made_from["template"].text + " ", made_from["template"].special_tokens, "")},
        "tokenizer": {"tokenizer": changed_tokenizer},
    }.items():
        with pytest.raises(CheckpointError, match=part):
            TokenStore.open(tmp_path / "store", store_key(**(made_from | change)))
    folder = tmp_path / "code"
    shutil.copytree(store_module.Path(store_module.__file__).parent, folder)
    monkeypatch.setattr(store_module, "__file__", str(folder / "store.py"))
    assert store_key(**made_from) == key
    for name in store_module.RENDERER_FILES:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b"\n# changed")
        with pytest.raises(CheckpointError, match="renderer"):
            TokenStore.open(tmp_path / "store", store_key(**made_from))
        (folder / name).write_bytes(before)
    assert TokenStore.open(tmp_path / "store", store_key(**made_from)).row_ids == [example(1)[0]]


def test_the_renderer_s_own_files_are_all_in_the_key():
    here = store_module.Path(store_module.__file__).parent
    text = "".join((here / name).read_text(encoding="utf-8") for name in store_module.RENDERER_FILES)
    used = {line.split()[1].removeprefix(".") for line in text.splitlines() if line.startswith("from .") and not line.startswith("from ..")}
    assert {f"{name}.py" for name in used} <= set(store_module.RENDERER_FILES)


def test_rendered_records_go_through_the_store_unchanged(made_from, tmp_path):
    template, tokenizer = made_from["template"], made_from["tokenizer"]
    rows = [
        make_conversation([Message("user", f"q {number}"), Message("assistant", f"a {number}")], Source("f", number))
        for number in range(30)
    ]
    stream = zip((row.row_id for row in rows), render_records(rows, template, tokenizer), strict=True)
    store = TokenStore.build(stream, tmp_path / "store", store_key(**made_from))
    for number, rendered in enumerate(render_records(rows, template, tokenizer)):
        assert store[number][0].tolist() == rendered.ids.tolist()
        assert store[number][1].tolist() == rendered.weights.tolist()
