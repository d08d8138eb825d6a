"""A saved result, ready to answer: the adapter on the base it was trained on, or the tuned model itself, with its tokenizer and heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import AdapterError, MissingFile
from ..recipe import ModelSection
from .embeddings import grow_embeddings
from .heads import load_heads
from .load import EMBEDDED, LoadedModel, hash_weights, load_model, load_tokenizer
from .methods import load_adapter
from .result import CARD, is_adapter, is_model, read_adapter_config, read_card, require_unaltered, scaling_of


@dataclass(frozen=True)
class Result:
    """A run's result in memory, in evaluation mode."""

    model: nn.Module
    """PEFT's model with the adapter on its base, or transformers' own."""
    tokenizer: PreTrainedTokenizerBase
    """With the chat template it was trained with."""
    heads: nn.ModuleDict
    """Linear heads on the last hidden state, `score` or `value`, where the result has them."""


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    trust_remote_code: bool = False,
) -> Result:
    """A result of any method, from a run directory, a stage's model folder or an adapter's folder, with the base that it was trained on.

    base: where that is, a folder or a hub's name, if it is not where it was. dtype: what the model is held in; auto is bfloat16 where the
    processor has it. trust_remote_code: whether code that the model brings may run. Raises MissingFile; CheckpointError where the files are
    not those that were saved; AdapterError where the base is another one or cannot be found; ModelError.

    >>> result = tunesmith.load("runs/quickstart")  # doctest: +SKIP
    >>> ids = result.tokenizer("hello", return_tensors="pt").input_ids  # doctest: +SKIP
    >>> result.model(input_ids=ids).logits.shape  # doctest: +SKIP
    torch.Size([1, 1, 49152])
    """
    folder = _result_folder(Path(path))
    require_unaltered(folder)
    if is_adapter(folder):
        section = _base_of(folder) if base is None else ModelSection(name=str(base))
        section = section.model_copy(update={"rope_scaling": scaling_of(folder), "quantization": read_card(folder).get("quantization")})
    else:
        section = ModelSection(name=str(folder.resolve()))
    loaded = load_model(section.model_copy(update={"dtype": dtype, "trust_remote_code": trust_remote_code}))
    heads = load_heads(folder, loaded.width).to(loaded.device)
    if not is_adapter(folder):
        return Result(loaded.model, loaded.tokenizer, heads)
    if (folder / "tokenizer_config.json").is_file():  # with the tokens that training brought
        loaded.tokenizer = load_tokenizer(str(folder), trust_remote_code)
        grow_embeddings(loaded.model, len(loaded.tokenizer))
    return Result(load_adapter(loaded, folder), loaded.tokenizer, heads)


def _result_folder(path: Path) -> Path:
    folder = path / "model" if (path / "recipe.yaml").is_file() else path
    if not is_model(folder):
        mend = "name a run directory, a stage's model folder or an adapter's folder"
        raise MissingFile("no result is here, neither an adapter nor a whole model", where=str(folder), mend=mend)
    return folder


def _base_of(folder: Path) -> ModelSection:
    """The base of a saved adapter: a folder of this machine, else embedded or on the hub under its name."""
    config, card = read_adapter_config(folder), read_card(folder).get("base", {})
    name, revision = card.get("name") or config.get("base_model_name_or_path") or "", card.get("revision") or config.get("revision")
    if lies := base_folder(folder):
        return ModelSection(name=str(lies))
    for known, embedded in EMBEDDED.items():
        if embedded.public_name == name and revision is None:
            return ModelSection(name=known)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        mend = "say where it is: tunesmith.load(path, base=FOLDER)"
        raise AdapterError(f"its base model, {name or 'which has no name'}, is not where it was", where=str(folder), mend=mend)
    return ModelSection(name=name, revision=revision)


def base_folder(folder: Path) -> Path | None:
    """Where the base of a saved adapter lies: where it lay, else, in a run that was moved, among the whole models of its stages.

    Raises CheckpointError where a file of it is not what was saved.
    """
    lay, expected = read_adapter_config(folder).get("base_model_name_or_path"), read_card(folder).get("base", {}).get("sha256")
    stages = sorted(folder.resolve().parent.parent.glob("*/model")) if expected else []  # RUN/stages/NAME/model
    moved = (model for model in stages if (model / CARD).is_file() and not is_adapter(model) and hash_weights(model) == expected)
    found = Path(lay) if lay and Path(lay).is_dir() else next(moved, None)
    if found is not None:
        require_unaltered(found)
    return found


def open_result(folder: Path, loaded: LoadedModel, *, trust_remote_code: bool = False) -> nn.Module:
    """A saved result ready to answer: the adapter on its base, or the fully tuned model.

    loaded: the recipe's base, with the template's new tokens, which an adapter is put on; one that was trained on another stage's full
    model gets that. trust_remote_code: whether code that a tuned model brings may run. Raises CheckpointError where a file is not what was
    saved.
    """
    require_unaltered(folder)
    dtype = str(loaded.dtype).removeprefix("torch.")

    def whole(name: Path) -> LoadedModel:
        held = {"name": str(name), "dtype": dtype, "trust_remote_code": trust_remote_code}
        if is_adapter(folder):  # its base, as it was held when it was trained
            held |= {"rope_scaling": scaling_of(folder), "quantization": read_card(folder).get("quantization")}
        return load_model(ModelSection(**held))

    if not is_adapter(folder):
        return whole(folder.resolve()).model
    if read_card(folder).get("base", {}).get("sha256") != loaded.identity.sha256 and (other := base_folder(folder)):
        tokens = len(loaded.tokenizer)
        loaded = whole(other)
        grow_embeddings(loaded.model, tokens)
    return load_adapter(loaded, folder)
