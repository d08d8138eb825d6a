"""Reward models at work: our own results with a `score` head, or any sequence-classification model, with whatever tokenizer.

    shared    an adapter and head trained on the policy's base: the base's weights are held once, the answers' own tokens are read
    separate  a result on another base, or fully tuned: a model of its own; answers are written anew in its template if its tokens differ
    foreign   transformers' AutoModelForSequenceClassification: the text is written in that model's template

A score is read at the last token of the answer, end of turn included, in rows without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..data.forest import build_forest
from ..data.records import Conversation, Message, Source
from ..data.render import render_records
from ..data.template import ChatTemplate, load_template
from ..errors import AdapterError, ModelError, TemplateError
from ..recipe import ModelSection
from .heads import HEADS, load_head
from .load import LoadedModel, load_model, quiet
from .methods import add_adapter, load_adapter
from .policy import Policy
from .result import is_adapter, read_adapter_config, read_card, require_unaltered

ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Scored:
    """What is scored: the messages before the answer, its text, and both as the policy's own tokens, int64 [T]."""

    prompt: tuple[Message, ...]
    text: str
    ids: np.ndarray


class RewardModel(Protocol):
    """Gives answers a score."""

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """float64 [N], in the answers' order; NaN for one that cannot be written for the model."""


@dataclass
class Shared:
    """An adapter beside the policy's on one base. `policy` is set once the policy is built, which the adapter must precede."""

    adapter: str
    head: nn.Linear
    policy: Policy | None = None

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """With the policy's adapter out and this one in."""
        return _head_scores(self.policy, self.adapter, self.head, [answer.ids for answer in answers])


@dataclass
class Separate:
    """A result of ours on a base of its own. template: to write answers in, None where its tokens are the policy's."""

    policy: Policy
    head: nn.Linear
    tokenizer: Any
    template: ChatTemplate | None

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """From the answers' own tokens, or from their text."""
        adapter = "default" if isinstance(self.policy.model, PeftModel) else None
        if self.template is None:
            return _head_scores(self.policy, adapter, self.head, [answer.ids for answer in answers])
        rows = _written(answers, self.template, self.tokenizer)
        known = [i for i, row in enumerate(rows) if row is not None]
        found = np.full(len(answers), np.nan)
        found[known] = _head_scores(self.policy, adapter, self.head, [rows[i] for i in known])
        return found


@dataclass
class Foreign:
    """A sequence-classification model with one output. Rows run one by one, so that no padding token can be read as the last."""

    model: nn.Module
    tokenizer: Any

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """From the text, in the model's template where it has one."""
        found = []
        for answer in answers:
            messages = [*(message.to_hf() for message in answer.prompt), {"role": "assistant", "content": answer.text}]
            if self.tokenizer.chat_template:
                ids = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, return_tensors="pt")
            else:
                text = "\n".join(message["content"] for message in messages)
                ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                found.append(float(self.model(input_ids=ids.to(self.model.device)).logits.reshape(-1)[0]))
        return np.array(found, dtype=np.float64)


def open_reward_model(folder: Path, loaded: LoadedModel, beside: nn.Module | None, name: str) -> RewardModel:
    """A saved reward model.

    loaded: the base of what it scores. beside: the policy's model, which an adapter on the same base joins under `name`; that must come
    before the policy is built, and its `policy` be set after. Raises AdapterError where the result has no score head or is for another
    base than it is put on, CheckpointError where a file was altered, ModelError where nothing there can be read.
    """
    require_unaltered(folder)
    if not (folder / HEADS).is_file():
        return _foreign(folder)
    card = read_card(folder)
    same_base = card.get("base", {}).get("sha256") == loaded.identity.sha256
    if is_adapter(folder) and same_base and isinstance(beside, PeftModel):
        add_adapter(beside, loaded, folder, name)
        return Shared(name, load_head(folder, "score", loaded.width).to(loaded.device))
    own = _own_base(folder, loaded)
    model = load_adapter(own, folder) if is_adapter(folder) else own.model
    own.tokenizer.chat_template = own.tokenizer.chat_template or loaded.tokenizer.chat_template
    same_tokens = own.tokenizer.backend_tokenizer.to_str() == loaded.tokenizer.backend_tokenizer.to_str()
    template = None if same_tokens else load_template(own.tokenizer, ModelSection(name=str(folder)))
    return Separate(Policy(model), load_head(folder, "score", own.width).to(own.device), own.tokenizer, template)


def _own_base(folder: Path, loaded: LoadedModel) -> LoadedModel:
    """The model that a result of ours is, or that its adapter goes on."""
    where = str(folder)
    if is_adapter(folder):
        where = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
        if not where or not Path(where).is_dir():
            raise AdapterError(f"the base that it was trained on is not there: {where or 'none is named'}", where=str(folder))
    return load_model(ModelSection(name=where, dtype=str(loaded.dtype).removeprefix("torch.")))


def _foreign(folder: Path) -> Foreign:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not (folder / "config.json").is_file() or is_adapter(folder):
        raise AdapterError(
            "it has no score head", where=str(folder), mend="name the result of a stage with objective reward, or a classification model"
        )
    try:
        with quiet():
            model, told = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"the reward model cannot be read: {error}", where=str(folder), mend="name a folder with safetensors") from error
    if model.config.num_labels != 1:
        raise ModelError(
            f"the reward model gives {model.config.num_labels} numbers", where=str(folder), mend="name one with a single output"
        )
    missing = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if missing:  # transformers fills them with random numbers, and warns
        what = f"the reward model's file lacks {', '.join(missing[:2])}"
        raise ModelError(what, where=str(folder), mend="name a sequence-classification model with whole weights")
    return Foreign(model.eval(), tokenizer)


def _head_scores(policy: Policy, adapter: str | None, head: nn.Linear, rows: Sequence[np.ndarray]) -> np.ndarray:
    """A head's number at the last token of each row, float64 [N]."""
    found = []
    with policy.using(adapter):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = [(ids, np.zeros(len(ids), dtype=np.float32)) for ids in rows[start : start + ROWS_AT_ONCE]]
            found.append(head(policy.last_hidden(build_forest(chunk)).float())[:, 0].double().cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)


def _written(answers: Sequence[Scored], template: ChatTemplate, tokenizer: Any) -> list[np.ndarray | None]:
    """Each answer's tokens in another template, up to the end of its turn; None where it cannot be written."""
    whole = [
        Conversation((*answer.prompt, Message("assistant", answer.text)), row_id=str(i), source=Source("rollouts", i))
        for i, answer in enumerate(answers)
    ]
    rows: list[np.ndarray | None] = []
    for rendered in render_records(whole, template, tokenizer, "last"):
        if isinstance(rendered, TemplateError) or not np.any(rendered.weights):
            rows.append(None)
        else:
            rows.append(rendered.ids[: int(np.flatnonzero(rendered.weights)[-1]) + 1].astype(np.int64))
    return rows
