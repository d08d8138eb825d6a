"""Hub data sets: `owner/name[@revision][:split]` or `owner/name:folder.split` to files on this machine.

The revision is resolved to a 40-digit commit first, and every file must be of that commit, so what was read can be
named. HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured as they stand when called. Which files a split has
is told by their names (train.jsonl, test_1.csv, data/train-00000-of-00002.parquet); what is ambiguous is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataRefused, MissingFile
from .files import SUFFIXES

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?:(?P<folder>[\w-]+)\.)?(?P<split>[A-Za-z][\w-]*))?",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_NAMES = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing", "eval", "evaluation")}
_SPLITS = frozenset({*_OTHER_NAMES, *(name for names in _OTHER_NAMES.values() for name in names)})
_TRUE = {"1", "ON", "YES", "TRUE"}
_TIMEOUT = 30.0  # seconds for one answer of the hub


def is_hub_name(source: str) -> bool:
    """Whether a source has the form of a hub data set's name, and not of a data file's."""
    match = _NAME.fullmatch(source)
    return match is not None and PurePosixPath(match["repo"]).suffix.lower() not in SUFFIXES


def fetch(source: str, default_split: str) -> tuple[list[tuple[Path, str]], str]:
    """([(file on this machine, its name for people)], commit) of a data set's split.

    Raises MissingFile where the data set, revision or split is not there or cannot be reached, DataRefused where its
    files cannot be told apart.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise MissingFile("not of the form owner/name[@revision][:split]", where=source, mend="check the name")
    repo, revision = match["repo"], match["revision"] or "main"
    folder = _offline_folder(repo, revision, source) if _offline() else None
    commit, names = _listed(folder) if folder else _ask(repo, revision, source)
    if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision) and commit != revision):
        raise DataRefused(
            f"the hub answered with commit {commit[:60]!r} for {revision}", where=source, mend="pin another commit, or check HF_ENDPOINT"
        )
    chosen = choose(names, match["split"], match["folder"], default_split, source)
    if folder:
        paths = [folder / name for name in chosen]
    else:
        paths = [_download(repo, name, revision, commit, source) for name in chosen]
    return [(path, f"{repo}@{commit}:{name}") for path, name in zip(paths, chosen, strict=True)], commit


def choose(names: list[str], split: str | None, folder: str | None, default_split: str, source: str) -> list[str]:
    """The data files of a split among a repository's file names, by its conventions, in order.

    A split that was not named and that no file is named for is, for training, every file that is named for no split.
    """
    data = sorted(
        name for name in names if PurePosixPath(name).suffix.lower() in SUFFIXES and PurePosixPath(name).name != "dataset_infos.json"
    )
    unsafe = [name for name in data if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts]
    if unsafe:
        raise DataRefused(
            f"the data set holds a file whose name leaves its folder: {unsafe[0][:80]!r}", where=source, mend="do not use this data set"
        )
    if folder is not None:
        data = [name for name in data if folder in PurePosixPath(name).parts[:-1]]
    wanted = split or default_split
    found = [name for name in data if _names_split(name, wanted)]
    if not found and split is None and default_split == "train":
        found = [name for name in data if not any(_names_split(name, other) for other in _SPLITS)]
    if not found:
        held = ", ".join(data[:8]) or "none"
        raise MissingFile(
            f"no data file of the split `{wanted}`", where=source, mend=f"name another split, as owner/name:split; its data files: {held}"
        )
    folders = sorted({str(PurePosixPath(name).parent) for name in found})
    if len(folders) > 1:
        mend = f"name the folder too, as in owner/name:{PurePosixPath(folders[-1]).name}.{wanted}"
        raise DataRefused(f"the split `{wanted}` lies in several folders: {', '.join(folders[:8])}", where=source, mend=mend)
    suffixes = sorted({PurePosixPath(name).suffix.lower() for name in found})
    if len(suffixes) > 1:
        raise DataRefused(
            f"the split `{wanted}` has files of several kinds: {', '.join(found[:8])}", where=source, mend="download one and name it"
        )
    return found


def _names_split(name: str, split: str) -> bool:
    """Whether `split` stands as a word in the file's name or is the folder it lies in; 'train' and not 'constraint'."""
    path = PurePosixPath(name)
    words = {*re.split(r"[-_.\s]|(?<=[a-z])(?=[0-9])", path.stem.lower()), *(part.lower() for part in path.parts[:-1])}
    return any(known in words for known in (split.lower(), *_OTHER_NAMES.get(split.lower(), ()))) or path.stem.lower() == split.lower()


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _cache() -> Path:
    from huggingface_hub import constants

    if named := os.environ.get("HF_HUB_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser() / "hub" if home else Path(constants.HF_HUB_CACHE)


def _ask(repo: str, revision: str, source: str) -> tuple[str, list[str]]:
    """(commit, file names) of a revision, from the hub."""
    from huggingface_hub import HfApi

    with _explained(source):
        info = HfApi(endpoint=_endpoint()).dataset_info(repo, revision=revision, timeout=_TIMEOUT)
    return info.sha or "", [sibling.rfilename for sibling in info.siblings or []]


def _download(repo: str, name: str, revision: str, commit: str, source: str) -> Path:
    """The file of `revision`, which must still be `commit`. Asked for by its name, so that the cache knows it offline."""
    from huggingface_hub import hf_hub_download

    with _explained(source):
        path = hf_hub_download(
            repo, name, repo_type="dataset", revision=revision, endpoint=_endpoint(), cache_dir=_cache(), etag_timeout=_TIMEOUT
        )
    if not Path(path).resolve().is_relative_to(_cache().resolve()):
        raise DataRefused(f"the file {name[:80]!r} would lie outside the hub's cache", where=source, mend="do not use this data set")
    if not Path(path).as_posix().endswith(f"/snapshots/{commit}/{name}"):
        raise DataRefused(
            f"{revision} is no longer commit {commit}: it moved while it was read", where=source, mend="run again, or pin a commit"
        )
    return Path(path)


def _offline_folder(repo: str, revision: str, source: str) -> Path:
    """The cached snapshot of a revision; its name is the commit."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, cache_dir=_cache(), local_files_only=True))
    except (OSError, ValueError) as error:
        raise MissingFile(
            "the data set is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            where=source,
            mend="unset HF_HUB_OFFLINE once, or name a local file",
        ) from error


def _listed(folder: Path) -> tuple[str, list[str]]:
    return folder.name, [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@contextmanager
def _explained(source: str) -> Iterator[Any]:
    """Turns what the hub's client raises into MissingFile with the mend."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise MissingFile("the data set is gated", where=source, mend="accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise MissingFile(
            f"no such data set at {_endpoint()}, nor a file of that name here",
            where=source,
            mend="check the name; a private one needs HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise MissingFile("the data set has no such revision", where=source, mend="check what stands after the @") from error
    except EntryNotFoundError as error:
        raise MissingFile("the hub lists a file that it does not have", where=source, mend="try again, or pin another commit") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise MissingFile(f"the hub answered {status}", where=source, mend="try again later, or name a local file") from error
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise MissingFile(
            f"the hub at {_endpoint()} cannot be reached or understood: {reason}", where=source, mend="check HF_ENDPOINT and the network"
        ) from error
