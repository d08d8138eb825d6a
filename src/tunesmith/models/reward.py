"""Reward models at work: our own results with a `score` head, or any sequence-classification model, with whatever tokenizer.

    shared    an adapter and head trained on the policy's base, whose weights are held once
    separate  a result on another base, or fully tuned: a model of its own
    foreign   transformers' AutoModelForSequenceClassification: the text is written in that model's template

The first two read the answers' own tokens where their training rows were written so; where template or tokens are others, answers are
written anew as those were. What a model reads them by is what its result's folder holds, never what its base's does.

A score is read at the last token of the answer, end of turn included, in rows without padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..data.forest import build_forest
from ..data.records import Conversation, Message, Source
from ..data.render import render_records
from ..data.template import ChatTemplate, RenderJob, load_template
from ..errors import AdapterError, ModelError, TemplateError
from ..recipe import ModelSection
from .adapters import POLICY
from .embeddings import grow_embeddings
from .heads import HEADS, load_head
from .load import LoadedModel, load_model, quiet
from .methods import add_adapter, load_adapter
from .opening import base_folder
from .policy import Policy
from .result import is_adapter, read_adapter_config, read_card, require_unaltered, scaling_of
from .virtual import virtual_count

ROWS_AT_ONCE = 32
UNBOUNDED = 1 << 20  # tokens of a row for a model whose config names no limit


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


@dataclass(frozen=True)
class Writer:
    """Writes answers anew for a model that was trained on other tokens or with another template than the policy's."""

    template: ChatTemplate
    tokenizer: Any

    def rows(self, answers: Sequence[Scored]) -> list[np.ndarray | None]:
        """Each answer's tokens, int64 [T], up to the end of its turn; None where it cannot be written."""
        whole = [
            Conversation((*answer.prompt, Message("assistant", answer.text)), row_id=str(i), source=Source("rollouts", i))
            for i, answer in enumerate(answers)
        ]
        rows: list[np.ndarray | None] = []
        for rendered in render_records(whole, self.template, self.tokenizer, "last"):
            if isinstance(rendered, TemplateError) or not np.any(rendered.weights):
                rows.append(None)
            else:
                rows.append(rendered.ids[: int(np.flatnonzero(rendered.weights)[-1]) + 1].astype(np.int64))
        return rows


@dataclass
class Shared:
    """An adapter beside the policy's on one base. `policy` is set once the policy is built, which the adapter must precede.

    writer: what writes the answers; None where their own tokens are read.
    """

    adapter: str
    head: nn.Linear
    writer: Writer | None = None
    policy: Policy | None = None

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """With the policy's adapter out and this one in."""
        return _head_scores(self.policy, self.adapter, self.head, _rows(answers, self.writer))


@dataclass
class Separate:
    """A result of ours on a base of its own. writer: what writes the answers; None where their own tokens are read."""

    policy: Policy
    head: nn.Linear
    writer: Writer | None = None

    @classmethod
    def of(cls, model: nn.Module, head: nn.Linear, writer: Writer | None = None) -> Separate:
        """On a model at hand. A whole model keeps its plain layers: without gradients only LoRA's product gains by a fast path."""
        return cls(Policy(model, fast=isinstance(model, PeftModel)), head, writer)

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """From the answers' own tokens, or from their text."""
        adapter = POLICY if isinstance(self.policy.model, PeftModel) else None
        return _head_scores(self.policy, adapter, self.head, _rows(answers, self.writer))


@dataclass
class Foreign:
    """A sequence-classification model with one output. Rows run one by one, so that no padding token can be read as the last.

    template: the model's own; without one the messages' text is joined by line breaks.
    """

    model: nn.Module
    tokenizer: Any
    template: ChatTemplate | None = None

    def scores(self, answers: Sequence[Scored]) -> np.ndarray:
        """From the text, in the model's template where it has one."""
        longest = min(_positions(self.model), self.tokenizer.model_max_length)
        found = np.full(len(answers), np.nan)
        for i, text in enumerate(self._texts(answers)):
            if isinstance(text, TemplateError):
                continue
            ids = self.tokenizer(text, add_special_tokens=self.template is None, return_tensors="pt")["input_ids"]
            if 0 < ids.shape[1] <= longest:
                with torch.no_grad():
                    found[i] = float(self.model(input_ids=ids.to(self.model.device)).logits.reshape(-1)[0])
        return found

    def _texts(self, answers: Sequence[Scored]) -> list[str | TemplateError]:
        asked = [[*(message.to_hf() for message in one.prompt), {"role": "assistant", "content": one.text}] for one in answers]
        if self.template is not None:
            return self.template.render_many([RenderJob(messages) for messages in asked])
        return [_joined(messages) for messages in asked]


def _joined(messages: Sequence[dict[str, Any]]) -> str | TemplateError:
    parts = [message["content"] for message in messages]
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else TemplateError("a message is no text")


def open_reward_model(folder: Path, loaded: LoadedModel, beside: nn.Module | None, name: str) -> RewardModel:
    """A saved reward model. It reads answers as its training rows were written: their own tokens only where the two are the same.

    loaded: the base of what it scores, with the policy's tokenizer and chat template. beside: the policy's model, which an adapter on the
    same base joins under `name`; that must come before the policy is built, and its `policy` be set after. Raises AdapterError where the
    result has no score head or is for another base than it is put on, CheckpointError where a file was altered, ModelError where nothing
    there can be read or it needs code of its own.
    """
    require_unaltered(folder)
    if not (folder / HEADS).is_file():
        return _foreign(folder, loaded)
    with _readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.chat_template = tokenizer.chat_template or loaded.tokenizer.chat_template
    writer = None if _written_alike(tokenizer, loaded.tokenizer) else Writer(_template(folder, tokenizer), tokenizer)
    same_base = read_card(folder).get("base", {}).get("sha256") == loaded.identity.sha256
    has_room = writer is None or len(tokenizer) <= loaded.model.config.get_text_config().vocab_size
    if is_adapter(folder) and same_base and has_room and isinstance(beside, PeftModel) and _of_one_kind(folder, beside):
        add_adapter(beside, loaded, folder, name)
        return Shared(name, load_head(folder, "score", loaded.width).to(loaded.device), writer)
    own = _own_base(folder, loaded, len(tokenizer))
    model = load_adapter(own, folder) if is_adapter(folder) else own.model
    return Separate.of(model, load_head(folder, "score", own.width).to(own.device), writer)


def _of_one_kind(folder: Path, beside: PeftModel) -> bool:
    """Whether a saved adapter is of the method that a model's own is, so that PEFT takes it beside that."""
    return read_adapter_config(folder).get("peft_type") == beside.peft_type


def _written_alike(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of a conversation: same template, same special tokens, same vocabulary and rules."""

    def decides(tokenizer: Any) -> tuple[Any, ...]:
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}  # calls leave these two behind
        return tokenizer.chat_template, dict(tokenizer.special_tokens_map), backend

    return decides(one) == decides(other)


def _template(folder: Path, tokenizer: Any) -> ChatTemplate:
    return load_template(tokenizer, ModelSection(name=str(folder)))


def _own_base(folder: Path, loaded: LoadedModel, tokens: int) -> LoadedModel:
    """The model that a result of ours is, or that its adapter goes on; with a row for each of its `tokens`, which the adapter may train."""
    where = base_folder(folder) if is_adapter(folder) else folder
    if where is None:
        lay = read_adapter_config(folder).get("base_model_name_or_path") or "none is named"
        raise AdapterError(f"the base that it was trained on is not there: {lay}", where=str(folder))
    with _readable(folder):
        held = {"name": str(where), "dtype": str(loaded.dtype).removeprefix("torch.")}
        if is_adapter(folder):  # its base, as it was held when it was trained
            held |= {"rope_scaling": scaling_of(folder), "quantization": read_card(folder).get("quantization")}
        own = load_model(ModelSection(**held))
    grow_embeddings(own.model, tokens)
    return own


def _foreign(folder: Path, loaded: LoadedModel) -> Foreign:
    if not (folder / "config.json").is_file() or is_adapter(folder):
        raise AdapterError(
            "it has no score head", where=str(folder), mend="name the result of a stage with objective reward, or a classification model"
        )
    with _readable(folder), quiet():
        model, told = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if model.config.num_labels != 1:
        raise ModelError(
            f"the reward model gives {model.config.num_labels} numbers", where=str(folder), mend="name one with a single output"
        )
    missing = sorted({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
    if missing:  # transformers fills them with random numbers, and warns
        what = f"the reward model's file lacks {', '.join(missing[:2])}"
        raise ModelError(what, where=str(folder), mend="name a sequence-classification model with whole weights")
    return Foreign(model.eval().to(loaded.device), tokenizer, _template(folder, tokenizer) if tokenizer.chat_template else None)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns what cannot be read into a ModelError; a reward model's own code never runs, whatever model.trust_remote_code says."""
    try:
        yield
    except (OSError, ValueError, ModelError) as error:
        if "trust_remote_code" in f"{error} {getattr(error, 'mend', '')}":
            what, mend = "the reward model brings code of its own, which is not run for reward models", "name one that transformers knows"
        elif isinstance(error, ModelError):
            raise
        else:
            what, mend = f"the reward model cannot be read: {error}", "name a folder with safetensors and a tokenizer"
        raise ModelError(what, where=str(folder), mend=mend) from error


def _rows(answers: Sequence[Scored], writer: Writer | None) -> Sequence[np.ndarray | None]:
    return [answer.ids for answer in answers] if writer is None else writer.rows(answers)


def _head_scores(policy: Policy, adapter: str | None, head: nn.Linear, rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """A head's number at the last token of each row, float64 [N]; NaN where there is no row, or one longer than the model's positions."""
    found = np.full(len(rows), np.nan)
    with policy.using(adapter):
        longest = _positions(policy.causal) - virtual_count(policy.model)
        known = [i for i, row in enumerate(rows) if row is not None and len(row) <= longest]
        for start in range(0, len(known), ROWS_AT_ONCE):
            chosen = known[start : start + ROWS_AT_ONCE]
            chunk = [(rows[i], np.zeros(len(rows[i]), dtype=np.float32)) for i in chosen]
            found[chosen] = head(policy.last_hidden(build_forest(chunk)).float())[:, 0].double().cpu().numpy()
    return found


def _positions(model: nn.Module) -> int:
    """The longest row in tokens that a model has positions for; RoBERTa's kind begins to count after its padding."""
    longest = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    if longest <= 0:
        longest = UNBOUNDED
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest = min(longest, module.num_embeddings - module.padding_idx - 1)
    return longest
