"""The data checks: what is wrong with rows that can be read, whatever their kind.

`check_data` drops exact duplicates, reports conflicting answers and near duplicates, and keeps test rows out of the training
rows. Each finding names rows, evidence and the mend, in the shape of data/health.json; lengths and the share of trainable
tokens become findings by `length_finding` and `trainable_share`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataRefused
from .preference import Answer, AnyRecord, PreferencePair, PromptOnly, Unpaired, kind_of_record, prompt_of
from .records import Conversation, Document, Message, canonical
from .similar import near_pairs, nearest, normalise, squeeze, words

if TYPE_CHECKING:
    from ..recipe import DataSection

SHOWN = 5  # pairs named in an error or a finding
IDENTIFYING_WORDS = 8  # of a last user turn after earlier ones, or a first exchange; fewer ("yes, do that") say nothing of its source
LOW_TRAINABLE_SHARE = 0.01  # of all tokens


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: `row_ids` is what the mend would remove or change, `related_ids` what they were compared with."""

    check: str
    row_ids: list[str]
    related_ids: list[str]
    evidence: str
    mend: str

    def to_json(self) -> dict[str, Any]:
        """One entry of health.json's findings."""
        return {"check": self.check, "row_ids": self.row_ids, "related_ids": self.related_ids, "evidence": self.evidence, "mend": self.mend}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The rows that remain, in order, the findings, and the number of rows dropped by the ledger's reasons."""

    records: list[AnyRecord]
    findings: list[Finding]
    dropped: dict[str, int]


def check_data(
    train: Sequence[AnyRecord], test: Sequence[AnyRecord], section: DataSection, findings: list[Finding] | None = None
) -> CheckResult:
    """Every check of training rows, alone and against the test rows.

    findings: a list that takes each finding as it is made, so that it holds them also where the rows are refused. Raises DataRefused
    where test rows are among the training rows and data.test_overlap is `refuse`, or where no training row would remain.
    """
    findings = [] if findings is None else findings
    kept, repeats = drop_duplicates(train)
    dropped = {"duplicate": len(train) - len(kept)}
    findings += repeats
    findings += conflicting_answers(kept)
    findings += conflicting_judgements(kept)
    findings += near_duplicates(kept, section.near_duplicate_threshold)
    findings += _repeated_test_rows(test)
    before = len(kept)
    kept = drop_test_overlap(kept, test, section, findings)
    dropped["test_overlap"] = before - len(kept)
    findings += shared_dialogues(kept, test)
    return CheckResult(kept, findings, {reason: n for reason, n in dropped.items() if n})


def drop_duplicates(records: Sequence[AnyRecord]) -> tuple[list[AnyRecord], list[Finding]]:
    """(rows without exact duplicates, a finding for each row that has some). Whitespace does not tell rows apart."""
    first: dict[str, AnyRecord] = {}
    later: dict[str, list[AnyRecord]] = defaultdict(list)
    for record in records:
        key = _whole_key(record)
        if first.setdefault(key, record) is not record:
            later[key].append(record)
    findings = [
        Finding(
            "duplicate",
            [record.row_id for record in copies],
            [first[key].row_id],
            f"{_places(copies)} repeat{'s' if len(copies) == 1 else ''} {first[key].source}",
            "nothing to do: the first is kept, the others are dropped",
        )
        for key, copies in later.items()
    ]
    return list(first.values()), findings


def conflicting_answers(records: Sequence[AnyRecord]) -> list[Finding]:
    """Rows with one prompt and different answers; reported, since both may be right where an answer is free text."""
    groups: dict[str, list[Conversation]] = defaultdict(list)
    for record in records:
        if isinstance(record, Conversation):
            groups[_prompt_key(record)].append(record)
    findings = []
    for rows in groups.values():
        answers = Counter(_answer_key(row) for row in rows)
        if len(answers) < 2:
            continue
        usual = _answer_key(max(rows, key=lambda row: answers[_answer_key(row)]))  # the first of the most frequent
        odd = [row for row in rows if _answer_key(row) != usual]
        others = [row for row in rows if _answer_key(row) == usual]
        shown = "; ".join(f"{row.source} answers {_short(row.answer)}" for row in [others[0], *odd][:SHOWN])
        mend = "look at them and keep the right answer, if only one can be right"
        findings.append(Finding("conflicting_answers", _ids(odd), _ids(others), f"the same prompt, {len(answers)} answers: {shown}", mend))
    return findings


def conflicting_judgements(records: Sequence[AnyRecord]) -> list[Finding]:
    """Pairs of the same two answers in both orders, and answers with both labels; reported, since people do disagree."""
    groups: dict[str, dict[str, list[AnyRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if isinstance(record, PreferencePair):
            chosen, rejected = _text_key(record.chosen), _text_key(record.rejected)
            groups[canonical([_prompt_key(record), sorted((chosen, rejected))])][chosen].append(record)
        elif isinstance(record, Unpaired):
            groups[canonical([_prompt_key(record), _text_key(record.completion)])][str(record.label)].append(record)
    findings = []
    for judgements in groups.values():
        if len(judgements) > 1:
            first, other = judgements.values()
            usual, odd = (first, other) if len(first) >= len(other) else (other, first)
            shown = f"{_places(usual)} against {_places(odd)}"
            mend = "look at them and keep the right judgement, if only one can be right"
            findings.append(Finding("conflicting_judgements", _ids(odd), _ids(usual), f"the same answers, judged both ways: {shown}", mend))
    return findings


def near_duplicates(records: Sequence[AnyRecord], threshold: float) -> list[Finding]:
    """Groups of rows whose word 3-grams overlap by at least `threshold`; reported only. Rows of one prompt conflict, and are not near."""
    parent = list(range(len(records)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    prompts = [None if isinstance(record, Document) else _prompt_key(record) for record in records]
    pairs = [
        pair
        for pair in near_pairs([text_of_record(record) for record in records], threshold)
        if prompts[pair[0]] is None or prompts[pair[0]] != prompts[pair[1]]
    ]
    for earlier, later, _ in pairs:
        high, low = sorted((root(earlier), root(later)), reverse=True)
        parent[high] = low
    groups: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
    for pair in pairs:
        groups[root(pair[0])].append(pair)
    findings = []
    for lowest, members in groups.items():
        rows = sorted({index for earlier, later, _ in members for index in (earlier, later)} - {lowest})
        shown = "; ".join(
            f"{records[later].source} and {records[earlier].source} by {similarity:.2f}" for earlier, later, similarity in members[:SHOWN]
        )
        mend = "look at them; many near copies teach little and weigh much"
        findings.append(Finding("near_duplicate", _ids([records[i] for i in rows]), [records[lowest].row_id], f"alike: {shown}", mend))
    return findings


def drop_test_overlap(
    train: Sequence[AnyRecord], test: Sequence[AnyRecord], section: DataSection, findings: list[Finding]
) -> list[AnyRecord]:
    """The training rows that are like no test row: by the last user text, but for case, whitespace and punctuation, or nearly.

    What overlaps is added to `findings`, then DataRefused is raised by data.test_overlap, and where nothing would remain.
    """
    overlap = find_test_overlap(train, test, section.near_duplicate_threshold)
    if not overlap:
        return list(train)
    shown = "; ".join(
        f"{train[i].row_id} ({train[i].source}) is {'' if likeness == 1 else f'{likeness:.2f} like '}{test[j].row_id} ({test[j].source})"
        for i, (j, likeness) in list(overlap.items())[:SHOWN]
    )
    what = f"{len(overlap)} of {len(train)} training rows are also test rows: {shown}"
    related = list(dict.fromkeys(test[j].row_id for j, _ in overlap.values()))
    refused, fate = section.test_overlap == "refuse", "the training rows are dropped and the test rows stay"
    mend = "remove them from one of the files" if refused else f"{fate}; a run without data.test_overlap: drop is refused"
    findings.append(Finding("test_overlap", [train[i].row_id for i in overlap], related, what, mend))
    if refused:
        where = train[0].source.path
        raise DataRefused(what, where=where, mend="remove them from one of the files, or set data.test_overlap: drop to train without them")
    kept = [record for index, record in enumerate(train) if index not in overlap]
    if not kept:
        raise DataRefused(
            f"every training row is also a test row, so none remains: {shown}", where=train[0].source.path, mend="name another test set"
        )
    return kept


def shared_dialogues(train: Sequence[AnyRecord], test: Sequence[AnyRecord]) -> list[Finding]:
    """Training rows that begin as a test row does, where both go on after their first exchange; reported, since what follows differs.

    An exchange that says little, such as a greeting, is no sign of one dialogue.
    """
    by_start: dict[str, int] = {}
    for index, record in enumerate(test):
        by_start.setdefault(_first_exchange(record), index)
    by_start.pop("", None)
    found = {index: by_start[key] for index, record in enumerate(train) if (key := _first_exchange(record)) in by_start}
    if not found:
        return []
    shown = "; ".join(f"{train[i].source} and {test[j].source}" for i, j in list(found.items())[:SHOWN])
    evidence = f"{len(found)} of {len(train)} training rows begin with the first question and answer of a test row: {shown}"
    related = list(dict.fromkeys(test[j].row_id for j in found.values()))
    mend = "if they are turns of one dialogue, put all rows of a dialogue into one of the files"
    return [Finding("shared_dialogue", [train[i].row_id for i in found], related, evidence, mend)]


def find_test_overlap(train: Sequence[AnyRecord], test: Sequence[AnyRecord], threshold: float) -> dict[int, tuple[int, float]]:
    """{index of a training row: (index of the test row it is like, similarity)}; similarity 1.0 for an exact one."""
    by_text: dict[str, int] = {}
    for index, record in enumerate(test):
        by_text.setdefault(normalise(asked_text(record)), index)
    by_text.pop("", None)
    texts = [asked_text(record) for record in train]
    found = {index: (by_text[key], 1.0) for index, text in enumerate(texts) if (key := normalise(text)) in by_text}
    near = nearest(texts, [asked_text(record) for record in test], threshold)
    return dict(sorted({**near, **found}.items()))


def asked_text(record: AnyRecord) -> str:
    """What tells a prompt apart: the last user turn; with the earlier ones where it is too short to say anything by itself."""
    if isinstance(record, Document):
        return record.text
    prompt = prompt_of(record)
    asked = [message.content for message in prompt if message.role == "user"] or [message.content for message in prompt]
    return asked[-1] if len(words(asked[-1])) >= IDENTIFYING_WORDS else "\n".join(asked)


def length_quantiles(lengths: Sequence[int] | np.ndarray) -> dict[str, float]:
    """Row lengths in tokens, as n, mean, and the least, p50, p90, p95, p99 and longest; no rows give n = 0 only."""
    values = np.asarray(lengths, dtype=np.int64)
    if values.size == 0:
        return {"n": 0}
    cuts = {"min": 0, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    return {"n": int(values.size), "mean": float(values.mean())} | {
        name: int(np.percentile(values, cut, method="inverted_cdf")) for name, cut in cuts.items()
    }


def length_finding(lengths: Sequence[int] | np.ndarray) -> Finding:
    """The length quantiles as a finding without rows."""
    found = length_quantiles(lengths)
    evidence = "tokens a row: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items() if name != "n") + f" (n {found['n']})"
    return Finding("length_quantiles", [], [], evidence, "nothing to do unless the longest rows are mistakes; data.max_length sets a limit")


def trainable_share(total: Sequence[int] | np.ndarray, supervised: Sequence[int] | np.ndarray, row_ids: Sequence[str] = ()) -> Finding:
    """The share of tokens that carry loss, from each row's tokens and its supervised tokens; names rows (of `row_ids`) that have none."""
    totals, trained = np.asarray(total, dtype=np.int64), np.asarray(supervised, dtype=np.int64)
    tokens, carrying = int(totals.sum()), int(trained.sum())
    share = carrying / tokens if tokens else 0.0
    without = np.flatnonzero(trained == 0)
    named = [row_ids[int(index)] for index in without] if row_ids else []
    evidence = f"{carrying} of {tokens} tokens carry loss ({share:.1%}); {without.size} of {trained.size} rows have none"
    if without.size:
        mend = "give these rows an answer with weight above 0, or remove them"
    elif share < LOW_TRAINABLE_SHARE:
        mend = "nearly all tokens are prompt: shorten the prompts, or check that the answers are whole"
    else:
        mend = "nothing to do"
    return Finding("trainable_tokens", named, [], evidence, mend)


def _repeated_test_rows(test: Sequence[AnyRecord]) -> list[Finding]:
    _, findings = drop_duplicates(test)
    mend = "remove the copies from the test file: each counts as an item of its own"
    return [Finding("repeated_test_row", found.row_ids, found.related_ids, found.evidence, mend) for found in findings]


def _whole_key(record: AnyRecord) -> str:
    if isinstance(record, Document):
        return squeeze(record.text)
    if isinstance(record, Conversation):
        return canonical([_squeezed(record.messages), list(record.tools or ())])
    more: Any = None
    if isinstance(record, PromptOnly):
        more = record.columns
    elif isinstance(record, PreferencePair):
        more = record.margin
    elif isinstance(record, Unpaired):
        more = record.label
    return canonical([kind_of_record(record), _prompt_key(record), [_squeezed(answer) for answer in record.answers], more])


def _prompt_key(record: AnyRecord) -> str:
    tools = () if isinstance(record, Document) else record.tools or ()
    return canonical([_squeezed(prompt_of(record)), list(tools)])


def _text_key(answer: Answer) -> str:
    return canonical(_squeezed(answer))


def _answer_key(record: Conversation) -> str:
    last = record.messages[-1]
    return canonical([squeeze(last.content), list(last.tool_calls or ())])


def _squeezed(messages: Sequence[Message]) -> list[dict[str, Any]]:
    given = [message.as_given() for message in messages]
    return [{key: squeeze(value) if isinstance(value, str) else value for key, value in message.items()} for message in given]


def text_of_record(record: AnyRecord) -> str:
    """All that was said, without system messages: what near copies are told by."""
    if isinstance(record, Document):
        return record.text
    if isinstance(record, Conversation):
        messages = [*record.messages]
    else:
        messages = [*record.prompt, *(message for answer in record.answers for message in answer)]
    return "\n".join(message.content for message in messages if message.role != "system")


def _first_exchange(record: AnyRecord) -> str:
    """The first question and its answer of a dialogue that goes on after them; empty where it does not, or says too little."""
    turns = [message for message in prompt_of(record) if message.role in ("user", "assistant")]
    asked = next((i for i, message in enumerate(turns) if message.role == "user"), len(turns))
    answered = next((i for i in range(asked, len(turns)) if turns[i].role == "assistant"), len(turns))
    if answered == len(turns):
        return ""
    said = [turns[asked].content, turns[answered].content]
    return canonical([normalise(text) for text in said]) if len(words("\n".join(said))) >= IDENTIFYING_WORDS else ""


def _ids(records: Sequence[AnyRecord]) -> list[str]:
    return [record.row_id for record in records]


def _places(records: Sequence[AnyRecord]) -> str:
    more = f" and {len(records) - SHOWN} more" if len(records) > SHOWN else ""
    return ", ".join(str(record.source) for record in records[:SHOWN]) + more


def _short(text: str) -> str:
    text = squeeze(text)
    return repr(text if len(text) <= 60 else text[:59] + "…")
