"""New tokens' rows in the embeddings and the head, which train and are saved beside an adapter of any kind.

PEFT knows them as `trainable_token_indices`, a field of LoRA's config alone; its code reads the name off any config, so others carry it as
an attribute, which is written into `adapter_config.json` and set again when that is read.
"""

from __future__ import annotations

from typing import Any, TypeVar

from peft import PeftConfig, PeftModel
from peft.utils import TrainableTokensWrapper
from transformers import PreTrainedModel

from ...errors import ModelError

FIELD = "trainable_token_indices"
Config = TypeVar("Config", bound=PeftConfig)


def with_new_tokens(config: Config, model: PreTrainedModel, tokens: list[int]) -> Config:
    """An adapter's config with tokens whose rows train besides: in the embeddings, and in the head where it has its own.

    Raises ModelError for a head with a bias.
    """
    return mark_tokens(config, _where_tokens_train(model, tokens) if tokens else None)


def mark_tokens(config: Config, where: list[int] | dict[str, list[int]] | None) -> Config:
    """Sets what `adapter_config.json` says of new tokens on a config, whose class may not know the field."""
    setattr(config, FIELD, where)
    return config


def saved_config(config: PeftConfig) -> dict[str, Any]:
    """What is written of a config: its fields, and where new tokens train."""
    where = getattr(config, FIELD, None)
    return config.to_dict() | ({FIELD: where} if where is not None else {})


def trained_tokens(config: dict[str, Any]) -> set[int]:
    """The new tokens that train beside an adapter in every place, by its `adapter_config.json`."""
    where = config.get(FIELD) or []
    return set.intersection(*map(set, where.values())) if isinstance(where, dict) else set(where)


def _where_tokens_train(model: PreTrainedModel, tokens: list[int]) -> list[int] | dict[str, list[int]]:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.bias is not None:
        raise ModelError("new tokens cannot train in a head with a bias", where=model.config.model_type, mend="use method full")
    if head.weight is embeddings.weight:
        return tokens
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[embeddings]: tokens, names[head]: tokens}


def fold_new_tokens(model: PeftModel) -> None:
    """Writes the policy's new tokens into the embeddings and the head themselves, for good, before an adapter is merged: of those that PEFT
    merges, it can do so for LoRA alone."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)]
    for name, module in wrapped:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.unload_and_optionally_merge_module(True, safe_merge=True, adapter_names=None))
