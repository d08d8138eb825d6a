"""A tiny model with a tiny tokenizer, in memory or as a folder, rows for it, and a stage's run on them: what training tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.families import tiny_model
from tunesmith.data.batching import Batch, DatasetSource
from tunesmith.data.forest import build_forest
from tunesmith.data.preference import PromptOnly
from tunesmith.data.records import Message, Source
from tunesmith.data.template import NAMED_TEMPLATES
from tunesmith.models.load import LoadedModel, ModelIdentity
from tunesmith.models.policy import Policy
from tunesmith.objectives import SFT
from tunesmith.recipe import ModelSection, Stage
from tunesmith.rundir import RunDirectory
from tunesmith.train.loop import Job
from tunesmith.train.optimiser import Optimiser
from tunesmith.train.signals import StopRequest
from tunesmith.train.stage import StageInputs, derive_stage, run_stage
from tunesmith.train.window import evaluate_loss

VOCABULARY = 97
Row = tuple[np.ndarray, np.ndarray]


class Rows(list):
    """Rows of (ids, weights) with what a token store tells of them."""

    def __init__(self, rows: Sequence[Row]):
        super().__init__(rows)
        self.row_ids = ["r" + hashlib.sha256(ids.tobytes()).hexdigest()[:12] for ids, _ in rows]
        self.lengths = np.array([len(ids) for ids, _ in rows])

    def keep(self, folder: Path, key: str = "{}") -> None:
        """Gives the rows what a token store has beside the tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "key.json").write_text(key)
        self.store = SimpleNamespace(folder=folder, lengths=self.lengths)
        self.positions, self.limit = range(len(self)), max(self.lengths)


def make_rows(count: int, *, seed: int = 0, vocabulary: int = VOCABULARY, shared: int = 0) -> Rows:
    """Random rows of 4 to 15 tokens after `shared` common ones; a token is mostly the one before it plus one, so there is much to learn."""
    rng = np.random.default_rng(seed)
    prefix = np.random.default_rng(1000).integers(1, vocabulary, shared)
    rows = []
    for _ in range(count):
        length = int(rng.integers(4, 16))
        body = (rng.integers(0, vocabulary) + np.arange(length)) % vocabulary
        ids = np.concatenate([prefix, body])
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[shared + int(rng.integers(1, 3)) :] = rng.choice([1.0, 0.5])
        rows.append((ids, weights))
    return Rows(rows)


def make_stage(**settings: Any) -> Stage:
    """A stage with quick settings, every open one derived for 12 rows."""
    rows = settings.pop("rows", 12)
    given = {"name": "sft", "objective": "sft", "learning_rate": 1e-2, "per_device_train_batch_size": 2} | settings
    given.setdefault("warmup_steps", 0 if given.get("max_steps") == 1 else 1)
    return derive_stage(Stage(**given), rows)


def loaded(model: PreTrainedModel, tokenizer: Any = None, folder: str = "") -> LoadedModel:
    """A model in memory as `load_model` would give it."""
    return LoadedModel(model, tokenizer or tiny_tokenizer(), ModelIdentity("tiny", "0" * 64, folder), model.dtype)


def make_job(
    policy: Policy, stage: Stage, run: RunDirectory, rows: Sequence[Row], *, validation: Sequence[Row] | None = None, **changed: Any
) -> Job:
    """A job of SFT, or of what `changed` puts in its place."""
    size, accumulation = stage.per_device_train_batch_size, stage.gradient_accumulation_steps
    objective = changed.get("objective", SFT())
    held_out = None
    if validation:
        once = DatasetSource(items_of(validation), batch_size=size, accumulation=1, seed=0).once
        held_out = lambda between: evaluate_loss(policy, objective, once(), between=between)  # noqa: E731
    parts: dict[str, Any] = {
        "stage": stage,
        "policy": policy,
        "objective": objective,
        "source": DatasetSource(items_of(rows), batch_size=size, accumulation=accumulation, seed=0),
        "optimiser": changed.get("optimiser") or Optimiser(policy.named_parameters(), stage),
        "run": run,
        "fingerprint": "f",
        "evaluate": held_out,
    }
    return Job(**(parts | changed))


def batch_of(rows: Sequence[Row], **options: Any) -> Batch:
    """Rows as one batch, each an item."""
    return Batch(build_forest(rows, **options), tuple(range(len(rows))), np.arange(len(rows)))


class ItemsOf(list):
    """Items of one or more rows, with what a store's items tell of them; of prompts also their records."""

    def __init__(self, items: Sequence[tuple[Row, ...]], rows: Sequence[Row], columns: dict[str, np.ndarray] | None = None):
        super().__init__(items)
        self.rows, self.columns = rows, dict(columns or {})
        self.row_ids = [f"i{i}" for i in range(len(items))]
        self.records: list[Any] = [None] * len(items)


def items_of(rows: Sequence[Row]) -> ItemsOf:
    """Rows as items of one row each."""
    return ItemsOf([(row,) for row in rows], rows)


def make_items(count: int, *, seed: int = 0, answers: int = 2, prompt: int = 6) -> ItemsOf:
    """Items of as many answers to a prompt, best first: the first counts on, the others are random.

    Of one answer every second one is good, and has such a label.
    """
    rng = np.random.default_rng(seed)
    items = []
    for number in range(count):
        asked = rng.integers(1, VOCABULARY, int(rng.integers(2, prompt + 1)))
        counted = 1 + (asked[-1] + np.arange(int(rng.integers(2, 8)))) % (VOCABULARY - 1)
        others = [rng.integers(1, VOCABULARY, int(rng.integers(2, 8))) for _ in range(answers)]
        given = [counted, *others[1:]] if answers > 1 or number % 2 == 0 else others
        weights = [np.r_[np.zeros(len(asked)), np.ones(len(answer))].astype(np.float32) for answer in given]
        items.append(tuple((np.r_[asked, answer], weight) for answer, weight in zip(given, weights, strict=True)))
    columns = {"label": np.arange(count) % 2 == 0} if answers == 1 else {}
    return ItemsOf(items, Rows([row for item in items for row in item]), columns)


def make_prompts(count: int, *, seed: int = 0, columns: dict[str, Any] | None = None) -> ItemsOf:
    """Prompts of 2 to 6 random tokens, which carry no loss, with their records."""
    rows = [item[0] for item in make_items(count, seed=seed)]
    rows = Rows([(ids[weights == 0], np.zeros(int((weights == 0).sum()), dtype=np.float32)) for ids, weights in rows])
    prompts = items_of(rows)
    prompts.records = [
        PromptOnly((Message("user", f"question {seed} {i}"),), dict(columns or {}), f"p{seed}-{i}", Source("prompts.jsonl", i))
        for i in range(count)
    ]
    return prompts


def train_stage(
    base: LoadedModel,
    stage: Stage,
    path: Path,
    rows: Rows | ItemsOf,
    *,
    validation: Rows | ItemsOf | None = None,
    resume: bool = True,
    stop: StopRequest | None = None,
    report: Callable[[dict[str, Any]], None] = lambda event: None,
    start: Path | None = None,
) -> torch.nn.Module:
    """run_stage in a run directory of its own."""
    inputs = stage_inputs(base, rows, path.parent / "stores", validation=validation, start=start)
    with RunDirectory.open(path, resume=resume) as run:
        return run_stage(stage, inputs, run, stop=stop or StopRequest(), report=report)


def stage_inputs(
    base: LoadedModel, rows: Rows | ItemsOf, stores: Path, *, validation: Rows | ItemsOf | None = None, **changed: Any
) -> StageInputs:
    """A stage's inputs with no template, or what `changed` says; the rows get token stores below `stores`, with a key alone in them."""
    train, held_out = (part if part is None or isinstance(part, ItemsOf) else items_of(part) for part in (rows, validation))
    for name, part in (("train", train), ("validation", held_out)):
        if part is not None:
            part.rows.keep(stores / name)
    data = SimpleNamespace(
        train=train.rows,
        items=train,
        records=train.records,
        validation=held_out.rows if held_out is not None else None,
        validation_items=held_out,
        validation_records=held_out.records if held_out is not None else [],
        max_length=64,
    )
    section = ModelSection(name="tiny")
    given = {"template": None, "new_tokens": [], "system": None, "start": None, "seed": 0}
    return StageInputs(loaded=base, section=section, data=data, **(given | changed))


def tiny_tokenizer(*, template: str | None = "chatml", markers: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, and an end of text; `markers`: also chatml's two tokens, with the chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", *(NAMED_TEMPLATES["chatml"].tokens if markers else ())]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=names[-1], pad_token=names[0])
    if template:
        tokenizer.chat_template = NAMED_TEMPLATES[template].text
    return tokenizer


def model_folder(
    path: Path, *, tied: bool = True, template: str | None = "chatml", markers: bool = True, seed: int = 0, hidden: int = 32
) -> Path:
    """A tiny Llama and its tokenizer, saved as a model's folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(template=template, markers=markers)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def is_a_neighbour(weights: torch.Tensor, masters: torch.Tensor) -> bool:
    """Whether each bf16 weight is one of the two that its master lies between, or its master."""
    upper, bits = weights.contiguous().view(torch.int16).int(), masters.contiguous().view(torch.int32)
    beyond = upper - (bits >> 16)
    return bool(((beyond == 0) | ((beyond == 1) & (bits & 0xFFFF != 0))).all())


__all__ = [
    "Rows",
    "VOCABULARY",
    "ItemsOf",
    "is_a_neighbour",
    "items_of",
    "make_items",
    "make_prompts",
    "batch_of",
    "loaded",
    "make_job",
    "make_rows",
    "make_stage",
    "model_folder",
    "stage_inputs",
    "tiny_model",
    "tiny_tokenizer",
    "train_stage",
]
