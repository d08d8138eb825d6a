"""The account of the data, the findings about training and data, and how to repeat the run.

Takes `RunFiles`; gives dictionaries for templates/account.html, findings.html and repeat.html.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from . import _words as words
from ._learning import resumed_words, stage_events, stage_settings
from ._read import RunFiles
from ._rollouts import training_findings
from ._words import Limits, excerpt, mapping, number, rows, text

_CHECKS = {
    "duplicate": "The same row more than once",
    "near_duplicate": "Nearly the same row more than once",
    "conflicting_answers": "One prompt with different answers",
    "test_overlap": "Training rows that are also in the test set",
    "shared_dialogue": "Training rows that begin as a test row does",
    "repeated_test_row": "The same test row more than once",
    "length_quantiles": "How long the rows are",
    "trainable_tokens": "How many tokens carry loss",
}


def ledger_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """The rows as a balanced account, the tokens, the first quarantined rows: of the recipe's data, then of each stage's own."""
    own = [_data_view(name, f"data/{name}", *found, limits) for name, found in list(run.stage_data.items())[: limits.entries]]
    return {"parts": [_data_view(None, "data", run.ledger, run.quarantine, limits), *own]}


def _data_view(
    stage: str | None, folder: str, ledger: dict[str, Any] | None, quarantine: list[dict[str, Any]] | None, limits: Limits
) -> dict[str, Any]:
    return {
        "stage": stage if stage is None else text(stage, limits.names),
        "folder": folder,
        "account": _account(ledger, limits) if ledger is not None else None,
        "quarantine": [_quarantined(row, limits) for row in (quarantine or [])[: limits.quarantine_rows]],
        "quarantined": None if quarantine is None else len(quarantine),
    }


def _account(ledger: dict[str, Any], limits: Limits) -> dict[str, Any]:
    dropped = mapping(ledger.get("rows_dropped"))
    lines = [("Trained", number(ledger.get("rows_trained"))), ("Held out for validation", number(ledger.get("rows_held_out")))]
    lines += [
        (f"Dropped: {text(reason, limits.names).replace('_', ' ')}", number(many))
        for reason, many in list(dropped.items())[: limits.entries]
    ]
    rows_in, known = number(ledger.get("rows_in")), [value for _, value in lines if value is not None]
    total = sum(known) if len(known) == len(lines) and len(dropped) <= limits.entries else None
    tokens = mapping(ledger.get("tokens"))
    return {
        "rows_in": words.count(rows_in),
        "lines": [(label, words.count(value)) for label, value in lines],
        "total": words.count(total),
        "balances": None if total is None or rows_in is None else total == rows_in,
        "off_by": words.count(abs((rows_in or 0) - (total or 0))),
        "tokens": [
            (label, words.count(tokens.get(key)))
            for label, key in (("in all", "total"), ("supervised", "supervised"), ("truncated", "truncated"))
        ],
    }


def _quarantined(row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    content = row.get("row")
    return {
        "place": f"{text(row.get('path'), 120)}:{text(row.get('line'), 20)}",
        "reason": excerpt(row.get("reason"), limits.quarantine_text),
        "row": excerpt(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), limits.quarantine_text),
    }


def findings_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """What happened in training, and health.json's findings in words; these are None when the file is missing."""
    settings = stage_settings(run)
    training = [
        {"title": one["title"], "evidence": excerpt(one["evidence"], limits.text), "mend": excerpt(one["mend"], limits.text)}
        for name, events in list(stage_events(run).items())
        for one in training_findings(name, events, settings.get(name, {}))
    ][: limits.findings]
    if run.health is None:
        return {"training": training, "findings": None, "left_out": 0}
    found = sorted(rows(run.health.get("findings")), key=lambda finding: not finding.get("row_ids"))
    return {
        "training": training,
        "findings": [_finding(finding, limits) for finding in found[: limits.findings]],
        "left_out": max(0, len(found) - limits.findings),
    }


def _finding(finding: dict[str, Any], limits: Limits) -> dict[str, Any]:
    check, ids, related = str(finding.get("check")), finding.get("row_ids"), finding.get("related_ids")
    ids, related = (value if isinstance(value, list) else [] for value in (ids, related))
    return {
        "title": _CHECKS.get(check) or words.readable(check, limits.names),
        "rows": len(ids),
        "ids": [text(row_id, 40) for row_id in ids[:6]],
        "related": [text(row_id, 40) for row_id in related[:6]],
        "evidence": excerpt(_evidence(finding.get("evidence")), limits.text),
        "mend": excerpt(finding.get("mend"), limits.text),
    }


def _evidence(evidence: Any) -> str:
    if isinstance(evidence, dict):
        return "; ".join(f"{str(key).replace('_', ' ')}: {_leaf(value)}" for key, value in evidence.items())
    if isinstance(evidence, list):
        return "; ".join(_leaf(item) for item in evidence)
    return "" if evidence is None else str(evidence)


def _leaf(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def repeat_view(run: RunFiles, limits: Limits) -> dict[str, Any]:
    """The command that repeats the run, the manifest's entries by group, and the recipe."""
    name = run.path.resolve().name or "run"
    found = _manifest_groups(run.manifest or {})
    groups, left = [], limits.entries
    for key, entries in found.items():
        shown = [(text(where, 120), text(entry, 160)) for where, entry in entries[: max(0, left)]]
        left -= len(shown)
        if shown:
            groups.append((words.readable(key), shown))
    return {
        "command": f"tunesmith run recipe.yaml --out {shlex.quote('../' + text(name, 200) + '-again')}"
        if run.recipe_text is not None
        else None,
        "groups": groups if run.manifest is not None else None,
        "left_out": sum(len(entries) for entries in found.values()) - (limits.entries - left),
        "recipe": excerpt(run.recipe_text, limits.recipe) if run.recipe_text is not None else None,
        "resumed": resumed_words(run),
    }


def _manifest_groups(manifest: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The manifest by its own groups; single values come together under `run`, and the recipe, shown whole below, stays out."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in manifest.items():
        if key == "recipe" and isinstance(value, dict):
            continue
        if isinstance(value, dict):
            groups.setdefault(key, []).extend(_flat(value) if value else [("", "nothing recorded")])
        else:
            groups.setdefault("run", []).extend(_flat({key: value}))
    return groups


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A JSON value as (dotted key, text) pairs."""
    if isinstance(value, dict):
        return [pair for key, part in value.items() for pair in _flat(part, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        return [pair for index, part in enumerate(value) for pair in _flat(part, f"{prefix}[{index}]")]
    if isinstance(value, list):
        return [(prefix, ", ".join(_leaf(part) for part in value))]
    if prefix.endswith("_bytes") and number(value) is not None:
        return [(prefix.removesuffix("_bytes"), words.size(number(value)))]
    return [(prefix, {True: "yes", False: "no", None: "not known"}[value] if value is None or isinstance(value, bool) else _leaf(value))]
