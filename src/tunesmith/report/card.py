"""The model card: README.md in the run directory and beside the adapter, with the front matter that hubs read. No local path goes in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..models.load import ModelIdentity
from ..models.result import is_adapter, read_adapter_config, read_card
from ..recipe import WHOLE
from ..rundir import MANIFEST, atomic_folder, verify_folder, write_text
from ._loading import base_notes, loading_code, whole_code

__all__ = ["base_notes", "export_card", "write_card"]

NAMES = {
    "lora": "A LoRA adapter",
    "ia3": "An IA3 adapter",
    "bottleneck": "A bottleneck adapter",
    "prefix": "A prefix-tuning adapter",
    "prompt": "A prompt-tuning adapter",
    "p_tuning": "A P-tuning adapter",
}
SIZES = ("r", "bottleneck_size", "num_virtual_tokens")
MAIN_METRICS = (
    "exact_match",
    "field_accuracy",
    "macro_f1",
    "rougeL",
    "json_validity",
    "gold_reward",
    "preference_accuracy",
    "reward",
    "perplexity",
)


def write_card(run_path: Path, base: ModelIdentity) -> None:
    """Writes the card of a run's tuned model from the run's own files."""
    recipe = yaml.safe_load((run_path / "recipe.yaml").read_text())
    evaluation = _read(run_path / "evaluation.json")
    stage, folder, about = recipe["stages"][-1], run_path / "model", asdict(base)
    adapter = is_adapter(folder)
    config = read_adapter_config(folder) if adapter else {}
    code = loading_code("model", recipe["model"], about, config, published=False) if adapter else whole_code("model")
    text = _front(recipe, stage, base.name, evaluation, adapter) + _body(recipe, stage, about, evaluation, adapter, code)
    if adapter and read_card(folder)["base"]["sha256"] == base.sha256:  # else another stage's whole model is its base
        text += _as_paragraphs(base_notes(recipe["model"], about, config, published=False))
    write_text(run_path / "README.md", text)
    _add_to_model((run_path / "model").resolve(), text)


def export_card(
    run_path: Path,
    recipe: dict[str, Any],
    card: dict[str, Any],
    *,
    stage: str | None,
    about: dict[str, Any],
    notes: Sequence[str],
    name: str,
    folder: Path,
) -> str:
    """The card of an export. card: the result's `tunesmith.json`; about: what was exported, with the merge's certificate; name: by which
    others load it; folder: where its weights lie now; the run's evaluation is of its last stage, so that another stage's card has none."""
    evaluation = _read(run_path / "evaluation.json") if stage in (None, recipe["stages"][-1]["name"]) else {}
    chosen = next((one for one in recipe["stages"] if one["name"] == stage), recipe["stages"][-1])
    base, parity = card["base"], about["parity"]
    adapter = is_adapter(folder)
    code = loading_code(name, recipe["model"], base, read_adapter_config(folder), published=True) if adapter else whole_code(name)
    lines = [_front(recipe, chosen, base["name"], evaluation, adapter) + _body(recipe, chosen, base, evaluation, adapter, code)]
    if parity is not None:
        what = "The weights are cast" if chosen["method"]["type"] in WHOLE else "The adapter is merged into the weights"
        lines.append(
            f"{what} ({about['dtype']}). Against the live model, on {parity['prompts']} rows "
            f"({parity['positions']} positions): KL {parity['kl_mean']:.2g} nats a position, at most {parity['kl_max']:.2g}.\n"
        )
    return "\n".join(lines) + _as_paragraphs(notes)


def _as_paragraphs(notes: Sequence[str]) -> str:
    return "".join(f"\n{note[0].upper()}{note[1:]}.\n" for note in notes)


def _front(recipe: dict[str, Any], stage: dict[str, Any], base: str, evaluation: dict[str, Any], adapter: bool) -> str:
    """The front matter that hubs read, and the title."""
    tags = ["tunesmith", *[stage["objective"]["type"] for stage in recipe["stages"]]]
    front = {
        "base_model": base,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if _scores(recipe) else "text-generation",
        "tags": [*tags, *([stage["method"]["type"]] if adapter else [])],
        "datasets": [Path(recipe["data"]["train"]).name],
        "metrics": recipe["task"]["metrics"],
        "model-index": [{"name": recipe["name"], "results": _results(evaluation, recipe["name"])}],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {recipe['name']}\n\n"


def _add_to_model(folder: Path, card: str) -> None:
    """Puts the card beside the weights: the folder is made anew, its files linked (copied where a file system has no links), and so it is
    whole at every moment."""
    verify_folder(folder)  # weights that were altered are never signed anew
    with atomic_folder(folder) as temporary:
        for file in folder.iterdir():
            if file.name not in ("README.md", MANIFEST):
                _link_or_copy(file, temporary / file.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def _link_or_copy(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)


def _scores(recipe: dict[str, Any]) -> bool:
    """Whether the result is a reward model, which scores answers and writes none."""
    return recipe["stages"][-1]["objective"]["type"] == "reward"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _tuned(evaluation: dict[str, Any]) -> dict[str, Any]:
    return evaluation.get("tasks", {}).get("task", {}).get("candidates", {}).get("tuned", {}).get("metrics", {})


def _results(evaluation: dict[str, Any], name: str) -> list[dict[str, Any]]:
    metrics = [{"type": key, "value": round(value["value"], 4)} for key, value in _tuned(evaluation).items() if key in MAIN_METRICS]
    if not metrics:
        return []
    return [{"task": {"type": "text-generation"}, "dataset": {"name": f"{name} test items", "type": "private"}, "metrics": metrics}]


def _method_words(method: dict[str, Any]) -> str:
    """`A LoRA adapter (r 16)`: a method and its size."""
    size = next((f" ({key.replace('_', ' ')} {method[key]})" for key in SIZES if method.get(key)), "")
    return f"{NAMES.get(method['type'], 'An adapter')}{size}"


def _body(recipe: dict[str, Any], stage: dict[str, Any], base: dict[str, Any], evaluation: dict[str, Any], adapter: bool, code: str) -> str:
    """adapter: whether the weights are one; else they are whole. code: how they are loaded."""
    what = f"{_method_words(stage['method'])} for" if adapter else "A tuned copy of"
    lines = [
        f"{what} {base['name']}, weights sha256 `{base['sha256']}`" + (f", revision `{base['revision']}`" if base["revision"] else "") + "."
    ]
    if recipe["task"]["description"]:
        lines.append(recipe["task"]["description"])
    reason = evaluation["recommendation"]["reason"] if evaluation else "It was trained and not evaluated: `tunesmith evaluate` does that."
    lines.append(f"Verdict: **{evaluation.get('verdict', 'NOT MEASURED')}**. {reason}")
    rows = [
        f"| {key} | {v['value']:.4g} | {v['low']:.4g} to {v['high']:.4g} | {v['n']} |"
        for key, v in _tuned(evaluation).items()
        if v.get("low") is not None
    ]
    if rows:
        lines.append("\n".join(["| metric | value | interval | n |", "| --- | --- | --- | --- |", *rows]))
    if _scores(recipe):
        words = "A reward model: the score of an answer is the `score` head of `heads.safetensors` on the hidden state of its last token."
        lines.append(f"{words} `tunesmith evaluate` measures it on pairs, and a stage of `ppo` names it as `reward_model`.")
    else:
        lines.append(f"```python\n{code}\n```")
    return "\n\n".join(lines) + "\n"
