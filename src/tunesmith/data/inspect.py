"""Looking at a data file, and the recipe that `tunesmith init FILE` proposes for it.

`inspect_file` says what a file holds; `propose_recipe` gives a commented recipe that runs on it as it stands, and the JSON
Schema of its answers where they are JSON, as texts by file name. Nothing is written here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from ..errors import DataRefused, MissingFile
from ..recipe import DataSection
from . import hub
from .check import find_test_overlap, text_of_record
from .files import SUFFIXES
from .guess import Kind, answer_kind, derive_schema, guess_columns, json_object, lacks_header
from .preference import Kind as RowKind
from .preference import kind_of_record
from .read import ReadResult, locate, open_rows, read_records
from .records import Conversation

MODEL = "smollm2-135m-instruct"
CONTEXT_BYTES = 20_000  # of a row, from which it may pass a context of 8,192 tokens
SHORT_ANSWER_WORDS = 5  # median; up to here an exact match is a fair demand on free text
MANY_ROWS = 2_000  # from which one pass is proposed in place of three
_VALUES_SHOWN = 1_500  # characters of a description that lists the allowed values
_GENERIC = {"train", "training", "data", "dataset", "rows", "test", "all", "messages"}
_RESERVED = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}
_COMMENT_COLUMN = 58


_PREFERENCE_STAGES: dict[RowKind, tuple[str, str]] = {
    "pair": ("dpo", "direct preference optimisation: the chosen answer gains on the rejected one"),
    "ranking": ("ranking", "as dpo, on the whole order of the answers"),
    "unpaired": ("kto", "good answers gain, bad ones lose, each for itself"),
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a data file holds: how it was read, the columns it needs mapped, and the kind of its answers."""

    source: str
    read: ReadResult
    columns: dict[str, str]
    kind: Kind
    labels: list[str]
    has_system: bool
    longest: int

    @property
    def rows_are(self) -> RowKind:
        """The kind of its rows."""
        return kind_of_record(self.read.records[0])

    @property
    def answers(self) -> list[str]:
        """The answers of its conversations, in order."""
        return [record.answer for record in self.read.records if isinstance(record, Conversation)]


def inspect_file(source: str, columns: dict[str, str] | None = None, *, default_split: str = "train") -> Inspection:
    """Reads a data file (or hub data set) and says what it holds; guesses the columns unless they are given.

    Raises what `read_records` raises; a guess that is not possible leaves its DataRefused, which names the rows.
    """
    try:
        read = read_records(source, DataSection(train=source, columns=columns or {}), default_split=default_split)
        guessed = guess_columns(_raw_rows(source, default_split)) if columns is None and read.format in ("text", "prompt") else None
    except DataRefused:
        rows = _raw_rows(source, default_split) if columns is None else []
        _require_header(source, rows)
        guessed = guess_columns(rows)
        if guessed is None:
            raise
    if guessed is not None:
        columns = guessed
        read = read_records(source, DataSection(train=source, columns=columns), default_split=default_split)
    talks = [record for record in read.records if isinstance(record, Conversation)]
    answers = [record.answer for record in talks]
    kind: Kind = answer_kind(answers) if talks else "documents"
    labels = [label for label, _ in Counter(answers).most_common()] if kind == "classification" else []
    has_system = any(message.role == "system" for record in talks for message in record.messages)
    sizes = [len(text_of_record(record).encode()) for record in read.records]
    return Inspection(source, read, dict(columns or {}), kind, sorted(labels), has_system, max(sizes))


def propose_recipe(path: str, test: str | None = None, *, folder: str | Path = ".") -> dict[str, str]:
    """{file name: text}: a commented recipe NAME.yaml for `path`, and NAME.schema.json where the answers are JSON.

    folder: where the files will lie; the recipe's paths start there. test: the test file, else a sibling named for it.
    The schema and the labels come from the training rows only. Raises MissingFile or DataRefused, also for prompts without answers.
    """
    train = inspect_file(path)
    if train.rows_are == "prompt":
        raise DataRefused(
            "the rows are prompts without answers, and what rewards an answer cannot be guessed",
            where=path,
            mend="write a stage with rewards (grpo, ppo; recipes/grpo.yaml is an example), or name the answers' column in data.columns",
        )
    tested, doubt = _inspect_test(path, test, train)
    name = recipe_name(path)
    files: dict[str, str] = {}
    schema = None
    if train.kind == "json":
        schema = derive_schema([found for answer in train.answers if (found := json_object(answer)) is not None])
        files[f"{name}.schema.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    rejected = f", {len(train.read.rejected)} more are unusable (tunesmith data check names them)" if train.read.rejected else ""
    lines = [
        f"# A recipe for {_scalar(Path(path).name)}, written by `tunesmith init`.",
        f"# It holds {len(train.read.records)} rows, read as {train.read.format}{rejected}.",
        f"# Look at what it would do by `tunesmith plan {name}.yaml`, then `tunesmith run {name}.yaml`.",
        _line(f"name: {_scalar(name)}", f"the run lies in runs/{name}"),
        "model:",
        _line(f"  name: {MODEL}", "the embedded model; or a folder, a .gguf file, a hub name (owner/name)"),
        *_task_lines(train, tested, schema, name),
        *_data_lines(train, tested, doubt, Path(folder)),
        *_stage_lines(train),
        *_evaluate_lines(train, tested, schema),
    ]
    return {f"{name}.yaml": "\n".join(lines) + "\n", **files}


def recipe_name(source: str) -> str:
    """A run's name from a file's: its stem, or where that says nothing (train) its folder's."""
    if not Path(source).exists() and hub.is_hub_name(source):
        words = [re.split("[@:]", source)[0].split("/")[1]]
    else:
        resolved = Path(source).expanduser().resolve()
        words = [resolved.stem, resolved.parent.name]
    made = [re.sub(r"[^A-Za-z0-9_.-]+", "-", word).strip("-._") for word in words]
    return next((word for word in made if word and word.lower() not in _GENERIC), made[0] or "my-run")[:60]


def find_test(source: str) -> str | None:
    """The test file beside a training file (test.csv beside train.csv or rows.csv, x_test.jsonl beside x_train.jsonl), if any."""
    path = Path(source).expanduser()
    if not path.exists():
        return f"{source}:test" if hub.is_hub_name(source) and ":" not in source else None
    stems = list(dict.fromkeys([re.sub(r"train(ing)?", "test", path.stem, count=1, flags=re.IGNORECASE), "test"]))
    for stem in stems:
        for suffix in (path.suffix, *SUFFIXES):
            candidate = path.with_name(stem + suffix)
            if stem != path.stem and candidate.is_file():
                return str(candidate)
    return None


def _require_header(source: str, rows: list[dict[str, Any]]) -> None:
    """Raises DataRefused for a table whose first line is a row: taken as a header it would be lost, and name the columns."""
    if Path(source).suffix.lower() in (".csv", ".tsv") and lacks_header(rows):
        first = ", ".join(repr(key if len(key) <= 40 else key[:39] + "…") for key in rows[0])
        raise DataRefused(
            f"the file has no header: its first line reads {first}",
            where=f"{source}:1",
            mend="put a first line above it that names the columns, such as text,label",
        )


def _raw_rows(source: str, default_split: str) -> list[dict[str, Any]]:
    files, _ = locate(source, default_split)
    return [raw.row for file in files for raw in open_rows(file, Counter(), hashlib.sha256()) if raw.row is not None]


def _inspect_test(path: str, test: str | None, train: Inspection) -> tuple[Inspection | None, str | None]:
    """(the test file, or None; why one that was found beside the training file is not used)."""
    if test is not None:
        return inspect_file(test, train.columns, default_split="test"), None
    found = find_test(path)
    if found is None:
        return None, None
    try:
        return inspect_file(found, train.columns, default_split="test"), None
    except (DataRefused, MissingFile) as error:
        return None, f"{Path(found).name} was not taken: {error.what.splitlines()[0]}"


def _task_lines(train: Inspection, tested: Inspection | None, schema: dict[str, Any] | None, name: str) -> list[str]:
    lines = ["task:"]
    if train.rows_are != "conversation":
        metrics = ["preference_accuracy"] if _judged_alike(train, tested) else []
        return [*lines, _line(f"  metrics: [{', '.join(metrics)}]", "measured on the test rows")]
    if train.kind in ("classification", "json"):
        whose = "rows bring their own system message; this one heads the report" if train.has_system else "the system message of every row"
        lines += [_comment(f"what the model is to do: {whose}"), *_block("  description", _description(train, schema))]
    else:
        lines.append(_comment("description: what the model is to do; would be the system message of rows that bring none"))
    if train.kind == "classification":
        lines.append(_line("  labels: auto", f"the allowed answers: the {len(train.labels)} of the training rows"))
    if schema is not None:
        lines.append(
            _line(f"  output_schema: {_scalar(f'{name}.schema.json')}", "derived from the training rows; all answers must satisfy it")
        )
        fits, test_answers = Draft202012Validator(schema).is_valid, tested.answers if tested else []
        if broken := sum(not fits(json_object(answer)) for answer in test_answers):
            lines.append(_comment(f"{broken} of {len(test_answers)} test answers do not: mend them or widen the schema before a run"))
    metrics = _metrics(train, schema)
    lines.append(_line(f"  metrics: [{', '.join(metrics)}]", "measured on the test rows; perplexity of the reference always is"))
    return lines


def _description(train: Inspection, schema: dict[str, Any] | None) -> str:
    if schema is None:
        return f"Classify the message. Answer with exactly one of these labels: {', '.join(train.labels)}."
    properties: dict[str, Any] = schema["properties"]
    text = f"Answer with a JSON object with the keys {', '.join(properties)}."
    allowed = "".join(f" {key} is one of: {', '.join(field['enum'])}." for key, field in properties.items() if "enum" in field)
    return text + allowed if len(allowed) <= _VALUES_SHOWN else text


def _metrics(train: Inspection, schema: dict[str, Any] | None) -> list[str]:
    if train.kind == "classification":
        return ["exact_match", "macro_f1"]
    if schema is not None:
        fields = schema["properties"].values()
        some = {"macro_f1": any("enum" in field for field in fields), "rougeL": {"type": "string"} in fields}
        return ["exact_match", "field_accuracy", *(name for name, fits in some.items() if fits), "json_validity"]
    if train.kind == "documents":
        return []
    lengths = sorted(len(answer.split()) for answer in train.answers)
    return ["exact_match", "rougeL"] if lengths[len(lengths) // 2] <= SHORT_ANSWER_WORDS else ["rougeL"]


def _data_lines(train: Inspection, tested: Inspection | None, doubt: str | None, folder: Path) -> list[str]:
    lines = ["data:", _line(f"  train: {_scalar(_relative(train.source, folder))}", f"{len(train.read.records)} rows")]
    if tested:
        lines.append(
            _line(f"  test: {_scalar(_relative(tested.source, folder))}", f"{len(tested.read.records)} rows, read once, at the end")
        )
        if overlap := find_test_overlap(train.read.records, tested.read.records, 0.9):
            lines.append(_line("  test_overlap: drop", f"{len(overlap)} training rows are also test rows; they are not trained on"))
    else:
        lines.append(_comment("test: a file of rows the training never sees; without one nothing can be proved"))
        if doubt:
            lines.append(_comment(doubt))
    if train.columns:
        pairs = ", ".join(f"{ours}: {_scalar(theirs)}" for ours, theirs in train.columns.items())
        lines.append(_line(f"  columns: {{{pairs}}}", "our field: the file's column"))
    lines.append(_line("  validation: 0.1", "the share of training rows held out for choices made on the way"))
    if train.longest > CONTEXT_BYTES:
        lines.append(_line("  too_long: drop", f"the longest row has {train.longest} bytes; rows over the model's context are left out"))
    return lines


RATE_IS_DERIVED = "learning_rate: derived from the method, the model's width and the objective, and said by plan; write one to override it"


def _stage_lines(train: Inspection) -> list[str]:
    epochs = 3 if len(train.read.records) < MANY_ROWS else 1
    if train.rows_are != "conversation":
        objective, what = _PREFERENCE_STAGES[train.rows_are]
        return [
            "stages:",
            _line(f"  - name: {objective}", f"its result lies in stages/{objective}/model"),
            _line(f"    objective: {{type: {objective}, beta: 0.1}}", what),
            _line("    method: {type: lora, r: 16}", "an adapter of rank 16; `full` trains every weight"),
            _comment(RATE_IS_DERIVED, indent=4),
            _line("    num_train_epochs: 1", "passes over the training rows; preferences are soon learned by heart"),
        ]
    return [
        "stages:",
        _line("  - name: sft", "its result lies in stages/sft/model"),
        _line("    objective: sft", "supervised fine-tuning: the loss falls on the answers"),
        _line("    method: {type: lora, r: 16}", "an adapter of rank 16; `full` trains every weight"),
        _comment(RATE_IS_DERIVED, indent=4),
        _line(f"    num_train_epochs: {epochs}", "passes over the training rows"),
    ]


def _judged_alike(train: Inspection, tested: Inspection | None) -> bool:
    """Whether there are held-out pairs, on which preference_accuracy can be measured."""
    return tested is not None and train.rows_are == tested.rows_are == "pair"


def _evaluate_lines(train: Inspection, tested: Inspection | None, schema: dict[str, Any] | None) -> list[str]:
    if train.rows_are != "conversation":
        lines = ["evaluate:", _line("  candidates: [zero_shot, tuned]", "compared on the same test rows")]
        if not _judged_alike(train, tested):
            return [*lines, _comment("gates need test rows that are pairs; without them the verdict is NOT MEASURED")]
        gate = "    - {metric: preference_accuracy, candidate: tuned, better_than: zero_shot}"
        return [*lines, _line("  gates:", "what PASS means: the whole interval of the difference above zero"), gate]
    metric = (_metrics(train, schema) or ["perplexity"])[0]
    labelled = train.kind == "classification" or (schema is not None and "macro_f1" in _metrics(train, schema))
    candidates = ["zero_shot", *([] if train.kind == "documents" else ["few_shot"]), *(["classical"] if labelled else []), "tuned"]
    baseline = "zero_shot" if train.kind == "documents" else "few_shot"
    lines = [
        "evaluate:",
        _line(f"  candidates: [{', '.join(candidates)}]", "compared on the same test rows"),
        _comment("general: a file of other conversations; perplexity on them shows what was forgotten"),
    ]
    if tested:
        gate = f"    - {{metric: {metric}, candidate: tuned, better_than: {baseline}}}"
        return [*lines, _line("  gates:", "what PASS means: the whole interval of the difference above zero"), gate]
    return [*lines, _comment("gates need test rows; without them the verdict is NOT MEASURED")]


def _relative(source: str, folder: Path) -> str:
    path = Path(source).expanduser()
    return os.path.relpath(path.absolute(), folder.absolute()) if path.exists() else source


def _line(setting: str, comment: str) -> str:
    return f"{setting.ljust(_COMMENT_COLUMN)} # {' '.join(comment.split())}"


def _comment(text: str, indent: int = 2) -> str:
    return f"{' ' * indent}# {' '.join(_printable(text).split())}"


def _block(key: str, text: str) -> list[str]:
    """A long text as folded lines where folding gives it back unchanged, else as one quoted line."""
    wrapped = textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)
    if " ".join(wrapped) == text == _printable(text) and not text.startswith((" ", "#")):
        return [f"{key}: >-", *(f"    {part}" for part in wrapped)]
    return [f"{key}: {_quoted(text)}"]


def _scalar(text: str) -> str:
    """Text as a YAML scalar: bare where that is safe, else quoted."""
    bare = re.fullmatch(r"(\.\./)*[A-Za-z_][A-Za-z0-9_./@-]*", text) and text.lower() not in _RESERVED
    return text if bare else _quoted(text)


def _quoted(text: str) -> str:
    return _printable(json.dumps(text, ensure_ascii=False))


def _printable(text: str) -> str:
    """Characters that YAML does not take as they are, escaped as in its double quotes."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)
