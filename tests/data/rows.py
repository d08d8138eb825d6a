"""Writing small data files and reading them back, for the tests of reading."""

from __future__ import annotations

import json

from tunesmith.data.read import read_records
from tunesmith.recipe import DataSection

GOOD = {"prompt": "What is 2+2?", "completion": "4"}


def section(**settings) -> DataSection:
    return DataSection(train="train.jsonl", **settings)


def write(folder, name, content) -> str:
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    return str(path)


def jsonl(folder, rows, name="train.jsonl") -> str:
    return write(folder, name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def read_one(folder, row, **settings):
    """The only record of a file with this row, which must be kept."""
    result = read_records(jsonl(folder, [row]), section(**settings))
    assert result.rejected == []
    return result.records[0]


def reason_of(folder, row, **settings) -> str:
    """Why this row is rejected from a file with ten good rows, each of which is kept."""
    result = read_records(jsonl(folder, [*[GOOD] * 5, row, *[GOOD] * 5]), section(format="prompt_completion", **settings))
    assert len(result.records) == 10
    assert [rejected.line for rejected in result.rejected] == [6]
    return result.rejected[0].reason


def turns(record) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record.messages]
