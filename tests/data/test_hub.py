"""Hub data sets, against a stand-in on loopback that speaks the few routes the hub's client uses."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tunesmith.data.hub import choose, is_hub_name
from tunesmith.data.read import read_records
from tunesmith.errors import DataRefused, MissingFile
from tunesmith.recipe import DataSection

COMMIT, OLDER = "a" * 40, "b" * 40
SECTION = DataSection(train="acme/tickets")


def lines(*pairs) -> bytes:
    return "".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in pairs).encode()


class Hub:
    """A hub with the data set acme/tickets. `files`: {commit: {name: bytes}}; `revisions`: {name: commit it answers with}."""

    def __init__(self):
        self.files = {
            COMMIT: {"README.md": b"# tickets", "train.jsonl": lines(("a", "b"), ("c", "d")), "test.jsonl": lines(("e", "f"))},
            OLDER: {"train.jsonl": lines(("old", "row"))},
        }
        self.revisions = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
        self.resolved: dict[str, str] = {}  # where a revision's files are of another commit than its listing
        self.requests: list[str] = []
        self.status: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def do_HEAD(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request) -> None:
        path = request.path.split("?")[0]
        self.requests.append(path)
        if self.status:
            return self.send(request, self.status, b"", {})
        if path.startswith("/api/datasets/acme/tickets/revision/"):
            commit = self.revisions.get(path.rsplit("/", 1)[1])
            if commit is None:
                return self.send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
            body = {"id": "acme/tickets", "sha": commit, "siblings": [{"rfilename": name} for name in self.files.get(commit, {})]}
            return self.send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if path.startswith("/datasets/acme/tickets/resolve/"):
            revision, name = path.removeprefix("/datasets/acme/tickets/resolve/").split("/", 1)
            commit = self.resolved.get(revision) or self.revisions.get(revision)
            content = self.files.get(commit, {}).get(name)
            if content is None:
                return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.send(request, 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})
        return self.send(request, 404, b"", {"X-Error-Code": "RepoNotFound"})

    def send(self, request, status, body, headers) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.server.shutdown()
    server.server.server_close()


def answers(result) -> list[str]:
    return [record.answer for record in result.records]


def test_a_hub_name_is_read_from_the_endpoint_in_the_environment_at_a_resolved_commit(hub):
    result = read_records("acme/tickets", SECTION)
    assert answers(result) == ["b", "d"]
    assert result.revision == COMMIT
    assert str(result.records[1].source) == f"acme/tickets@{COMMIT}:train.jsonl:2"
    assert result.sha256 == hashlib.sha256(hub.files[COMMIT]["train.jsonl"]).hexdigest()


def test_a_split_and_a_revision_are_taken_from_the_name(hub):
    assert answers(read_records("acme/tickets:test", SECTION)) == ["f"]
    assert answers(read_records("acme/tickets", SECTION, default_split="test")) == ["f"]
    old = read_records("acme/tickets@v1:train", SECTION)
    assert (answers(old), old.revision) == (["row"], OLDER)
    assert answers(read_records(f"acme/tickets@{OLDER}", SECTION)) == ["row"]


def test_all_shards_of_a_split_are_read_in_order_and_hashed(hub):
    hub.files[COMMIT] = {f"data/train-0000{i}-of-00003.jsonl": lines((f"q{i}", f"a{i}")) for i in (2, 0, 1)}
    result = read_records("acme/tickets", SECTION)
    assert answers(result) == ["a0", "a1", "a2"]
    assert len(result.files) == 3
    digests = "".join(f"{hashlib.sha256(hub.files[COMMIT][name]).hexdigest()}  {name[5:]}\n" for name in sorted(hub.files[COMMIT]))
    assert result.sha256 == hashlib.sha256(digests.encode()).hexdigest()


def test_a_local_path_wins_over_a_hub_name(hub, tmp_path):
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "tickets").mkdir()
    with pytest.raises(MissingFile, match="folder"):
        read_records("acme/tickets", SECTION)
    assert hub.requests == []


def test_offline_reads_the_cache_and_asks_nobody(hub, monkeypatch):
    read_records("acme/tickets", SECTION)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("acme/tickets", f"acme/tickets@{COMMIT}"):
        result = read_records(name, SECTION)
        assert (answers(result), result.revision) == (["b", "d"], COMMIT)
    with pytest.raises(MissingFile, match="HF_HUB_OFFLINE forbids"):
        read_records("acme/other", SECTION)
    assert hub.requests == []


@pytest.mark.parametrize(
    "source, message",
    [
        ("acme/absent", "no such data set at http://127.0.0.1:"),
        ("acme/tickets@v9", "no such revision"),
        ("acme/tickets:validation", "no data file of the split `validation`"),
    ],
)
def test_what_the_hub_does_not_have_is_a_missing_file(hub, source, message):
    with pytest.raises(MissingFile, match=message):
        read_records(source, SECTION)


def test_a_hub_that_fails_or_is_not_there_is_named_with_the_mend(hub, monkeypatch):
    hub.status = 403
    with pytest.raises(MissingFile, match="the hub answered 403"):
        read_records("acme/tickets", SECTION)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingFile, match=r"http://127.0.0.1:9 cannot be reached"):
        read_records("acme/tickets", SECTION)


def test_a_pinned_commit_that_the_hub_answers_with_another_for_is_refused(hub):
    hub.revisions[OLDER] = COMMIT
    with pytest.raises(DataRefused, match="answered with commit"):
        read_records(f"acme/tickets@{OLDER}", SECTION)


def test_a_branch_that_moves_between_the_listing_and_a_file_is_refused(hub):
    hub.resolved["main"] = OLDER
    with pytest.raises(DataRefused, match="it moved while it was read"):
        read_records("acme/tickets", SECTION)


@pytest.mark.parametrize("name", ["../../train.jsonl", "/etc/train.jsonl", "a\\..\\train.jsonl"])
def test_a_file_name_that_leaves_its_folder_is_refused_and_not_asked_for(hub, name):
    hub.files[COMMIT] = {name: lines(("a", "b"))}
    with pytest.raises(DataRefused, match="leaves its folder"):
        read_records("acme/tickets", SECTION)
    assert not any("/resolve/" in path for path in hub.requests)


@pytest.mark.parametrize(
    "names, split, folder, chosen",
    [
        (["train.jsonl", "test.jsonl"], "test", None, ["test.jsonl"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"], "train", None, 2),
        (["en/train.csv", "de/train.csv"], "train", "de", ["de/train.csv"]),
        (["my_train.csv", "constraint.csv"], "train", None, ["my_train.csv"]),
        (["dev.jsonl", "train1.jsonl"], "validation", None, ["dev.jsonl"]),
        (["train1.jsonl", "dev.jsonl"], "train", None, ["train1.jsonl"]),
        (["rows.jsonl", "test.jsonl", "dataset_infos.json"], None, None, ["rows.jsonl"]),
        (["train/0.parquet", "train/1.parquet"], None, None, 2),
    ],
)
def test_the_files_of_a_split_are_found_by_their_names(names, split, folder, chosen):
    found = choose(names, split, folder, "train", "acme/tickets")
    assert found == chosen if isinstance(chosen, list) else len(found) == chosen


@pytest.mark.parametrize(
    "names, message", [(["en/train.csv", "de/train.csv"], "several folders: de, en"), (["train.csv", "train.jsonl"], "several kinds")]
)
def test_an_ambiguous_split_is_refused_and_not_guessed(names, message):
    with pytest.raises(DataRefused, match=message):
        choose(names, None, None, "train", "acme/tickets")


@pytest.mark.parametrize(
    "name", ["acme/tickets", "acme/tickets@main", "acme/tickets@" + COMMIT + ":test", "acme/tickets:en.train", "a/b.c"]
)
def test_hub_names_are_told_apart_from_paths(name):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["train.jsonl", "data/train.jsonl", "a/b/c", "/a/b", "./a/b", "../b", "a/b:c/d", "a/b\n", "a /b", "~/b", "a/b.parquet:x"]
)
def test_paths_are_no_hub_names(name):
    assert not is_hub_name(name)
