"""Looking at a data file without training on it: what `tunesmith data check` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .data.check import check_data
from .data.read import read_records
from .recipe import DataSection


def check_data_file(train: str | Path, test: str | Path | None = None, *, columns: dict[str, str] | None = None) -> dict[str, Any]:
    """Reads and checks a data file, alone and against a test file. Lengths in tokens need a model and are in `plan`.

    Returns {"format", "rows_in", "rejected", "dropped", "findings", "notes"}. Raises MissingFile or DataRefused.
    """
    section = DataSection(train=str(train), test=str(test) if test else None, columns=columns or {}, test_overlap="drop")
    read = read_records(section.train, section)
    tests = read_records(section.test, section, default_split="test").records if section.test else []
    checked = check_data(read.records, tests, section)
    return {
        "format": read.format,
        "rows_in": read.rows_in,
        "rejected": [row.to_json() for row in read.rejected],
        "dropped": checked.dropped,
        "findings": [finding.to_json() for finding in checked.findings],
        "notes": read.notes,
    }
