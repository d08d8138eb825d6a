"""Looking at a data file without training on it: what `tunesmith data check` and `tunesmith init` do."""

from __future__ import annotations

import difflib
import importlib.metadata
from pathlib import Path
from typing import Any, cast, get_args

from .data.check import check_data
from .data.inspect import propose_recipe
from .data.read import read_records
from .errors import OutputInUse, RecipeError
from .recipe import DataSection
from .recipe.data import Format
from .rundir import write_text


def init(file: str | Path, test: str | Path | None = None, *, out: str | Path = ".", force: bool = False) -> list[Path]:
    """Writes a commented recipe for a data file (or a hub data set) into the folder `out`, and a schema of its answers where they are JSON.

    test: the test file, else one beside `file`. Returns what was written, the recipe first. Raises MissingFile or DataRefused, and
    OutputInUse where a file is there already, unless force; RecipeError where `out` is a recipe's name, or `test` is
    `file` itself.
    """
    folder = Path(out)
    if folder.suffix in (".yaml", ".yml") and not folder.is_dir():
        raise RecipeError("the recipe goes into a folder, and this is a file's name", where=f"--out {out}", mend=f"--out {folder.parent}")
    if test and Path(test).exists() and Path(file).exists() and Path(test).samefile(file):
        raise RecipeError("these are the training rows", where=f"--test {test}", mend="name a file of other rows, or leave it out")
    files = propose_recipe(str(file), str(test) if test else None, folder=folder)
    taken = [str(folder / name) for name in files if (folder / name).exists()]
    if taken and not force:
        raise OutputInUse(
            f"{', '.join(taken)} is there already", where=str(folder), mend="choose another folder with --out, or add --force"
        )
    for name, content in files.items():
        write_text(folder / name, content)
    return [folder / name for name in files]


def package_version() -> str:
    """This package's version."""
    try:
        return importlib.metadata.version("tunesmith")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "(not installed)"


def check_data_file(
    train: str | Path, test: str | Path | None = None, *, columns: dict[str, str] | None = None, format: Format | str = "auto"
) -> dict[str, Any]:
    """Reads and checks a data file, alone and against a test file. Lengths in tokens need a model and are in `plan`.

    columns, format: as data.columns and data.format of a recipe. Returns {"format", "rows_in", "test_rows_in", "rejected", "dropped",
    "findings", "notes"}; test_rows_in is None without a test file, and each rejected row names its file. Raises MissingFile or
    DataRefused, and RecipeError for a column or format that is not there.
    """
    if format not in get_args(Format):
        near = difflib.get_close_matches(format, get_args(Format), n=1)
        mend = f"did you mean `{near[0]}`?" if near else f"one of: {', '.join(get_args(Format))}"
        raise RecipeError(f"no format is called `{format}`", where="--format", mend=mend)
    section = DataSection(
        train=str(train), test=str(test) if test else None, columns=columns or {}, format=cast(Format, format), test_overlap="drop"
    )
    read = read_records(section.train, section)
    tests = read_records(section.test, section, default_split="test") if section.test else None
    checked = check_data(read.records, tests.records if tests else [], section)
    return {
        "format": read.format,
        "rows_in": read.rows_in,
        "test_rows_in": tests.rows_in if tests else None,
        "rejected": [row.to_json() for row in [*read.rejected, *(tests.rejected if tests else ())]],
        "dropped": checked.dropped,
        "findings": [finding.to_json() for finding in checked.findings],
        "notes": list(dict.fromkeys([*read.notes, *(tests.notes if tests else ())])),
    }
