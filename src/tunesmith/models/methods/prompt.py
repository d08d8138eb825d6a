"""Prompt tuning, P-tuning and prefix tuning on PEFT's prompt encoders; `models/virtual.py` says how their tokens are computed."""

from __future__ import annotations

from typing import Any

import torch
from peft import PrefixEncoder, PrefixTuningConfig, PromptEncoder, PromptEncoderConfig, PromptLearningConfig, PromptTuningConfig
from peft.utils import _prepare_prompt_learning_config
from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError, RecipeError
from ...recipe import PrefixMethod, PromptMethod, PTuningMethod
from ..adapters import POLICY
from ..load import LoadedModel
from .saving import put_adapter
from .tokens import with_new_tokens

NO_WEIGHT = "no weight of a model holds learned tokens"


class Prompt:
    """Embeddings of tokens that are none, before every row."""

    unchanged = False
    mergeable = NO_WEIGHT
    peft_type = "PROMPT_TUNING"

    def resolve(self, model: PreTrainedModel, settings: PromptMethod) -> PromptMethod:
        """Nothing is derived."""
        return settings

    def attach(self, loaded: LoadedModel, settings: PromptMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """From the embeddings of random tokens, or of a text's; these PEFT would take with a tokenizer loaded by name."""
        model = put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)
        if settings.prompt_tuning_init_text is not None:
            ids = loaded.tokenizer(settings.prompt_tuning_init_text)["input_ids"]
            if not ids:
                where = "method.prompt_tuning_init_text"
                raise RecipeError("the text has no tokens", where=where, mend="write some, or leave it out: random tokens are taken then")
            ids = (ids * -(-settings.num_virtual_tokens // len(ids)))[: settings.num_virtual_tokens]
            with torch.no_grad():
                started = loaded.model.get_input_embeddings()(torch.tensor(ids, device=loaded.device))
            model.prompt_encoder[POLICY].embedding.weight.data.copy_(started)
        return model

    def trainable(self, model: PreTrainedModel, settings: PromptMethod) -> int:
        """One embedding a token."""
        return settings.num_virtual_tokens * _width(model)

    def config(self, loaded: LoadedModel, settings: PromptMethod, new_tokens: list[int]) -> PromptTuningConfig:
        """PEFT's config."""
        config = PromptTuningConfig(
            prompt_tuning_init="SAMPLE_VOCAB",
            prompt_tuning_init_text=settings.prompt_tuning_init_text,
            base_model_name_or_path=loaded.identity.folder,
            **_shape(loaded.model, settings.num_virtual_tokens),
        )
        return with_new_tokens(config, loaded.model, new_tokens)

    def settings_of(self, config: dict[str, Any], names: list[str]) -> PromptMethod:
        """As PEFT wrote them."""
        text = config.get("prompt_tuning_init_text")
        return PromptMethod(num_virtual_tokens=config["num_virtual_tokens"], prompt_tuning_init_text=text)


class PTuning:
    """Embeddings of tokens that are none, made by a network."""

    unchanged = False
    mergeable = NO_WEIGHT
    peft_type = "P_TUNING"

    def resolve(self, model: PreTrainedModel, settings: PTuningMethod) -> PTuningMethod:
        """With the network's width, and an LSTM's layers."""
        layers = settings.encoder_num_layers
        if layers is None and settings.encoder_reparameterization_type == "LSTM":
            layers = 2
        return settings.model_copy(
            update={"encoder_hidden_size": settings.encoder_hidden_size or _width(model), "encoder_num_layers": layers}
        )

    def attach(self, loaded: LoadedModel, settings: PTuningMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """A fresh network."""
        return put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)

    def trainable(self, model: PreTrainedModel, settings: PTuningMethod) -> int:
        """The network and its input."""
        return _parameters(PromptEncoder, _p_tuning(model, settings))

    def config(self, loaded: LoadedModel, settings: PTuningMethod, new_tokens: list[int]) -> PromptEncoderConfig:
        """PEFT's config."""
        config = _p_tuning(loaded.model, settings, base_model_name_or_path=loaded.identity.folder)
        return with_new_tokens(config, loaded.model, new_tokens)

    def settings_of(self, config: dict[str, Any], names: list[str]) -> PTuningMethod:
        """As PEFT wrote them."""
        kind = config["encoder_reparameterization_type"]
        return PTuningMethod(
            num_virtual_tokens=config["num_virtual_tokens"],
            encoder_reparameterization_type=kind,
            encoder_hidden_size=config["encoder_hidden_size"],
            encoder_num_layers=config["encoder_num_layers"] if kind == "LSTM" else None,
        )


class Prefix:
    """Keys and values of tokens that are none, in every layer."""

    unchanged = False
    mergeable = NO_WEIGHT
    peft_type = "PREFIX_TUNING"

    def resolve(self, model: PreTrainedModel, settings: PrefixMethod) -> PrefixMethod:
        """With the network's width, where there is one. Raises ModelError where a layer has no keys and values of its own."""
        config = model.config.get_text_config()
        if getattr(config, "num_kv_shared_layers", 0):
            what = "prefix tuning learns keys and values of each layer, and some layers of this model use those of another"
            raise ModelError(what, where=config.model_type, mend="use another method, such as prompt")
        width = settings.encoder_hidden_size or _width(model)
        return settings.model_copy(update={"encoder_hidden_size": width}) if settings.prefix_projection else settings

    def attach(self, loaded: LoadedModel, settings: PrefixMethod, *, seed: int, new_tokens: list[int]) -> nn.Module:
        """A random prefix, or a fresh network."""
        return put_adapter(loaded.model, self.config(loaded, settings, new_tokens), seed=seed)

    def trainable(self, model: PreTrainedModel, settings: PrefixMethod) -> int:
        """The prefix itself, or the network and its input."""
        return _parameters(PrefixEncoder, _prepare_prompt_learning_config(_prefix(settings), model.config))

    def config(self, loaded: LoadedModel, settings: PrefixMethod, new_tokens: list[int]) -> PrefixTuningConfig:
        """PEFT's config; of how many heads and layers, PEFT takes from the model's."""
        return with_new_tokens(_prefix(settings, base_model_name_or_path=loaded.identity.folder), loaded.model, new_tokens)

    def settings_of(self, config: dict[str, Any], names: list[str]) -> PrefixMethod:
        """As PEFT wrote them."""
        projected = bool(config.get("prefix_projection"))
        return PrefixMethod(
            num_virtual_tokens=config["num_virtual_tokens"],
            prefix_projection=projected,
            encoder_hidden_size=config["encoder_hidden_size"] if projected else None,
        )


def _width(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[1]


def _shape(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "num_virtual_tokens": tokens, "token_dim": _width(model)}


def _p_tuning(model: PreTrainedModel, settings: PTuningMethod, **more: Any) -> PromptEncoderConfig:
    return PromptEncoderConfig(
        encoder_reparameterization_type=settings.encoder_reparameterization_type,
        encoder_hidden_size=settings.encoder_hidden_size,
        encoder_num_layers=settings.encoder_num_layers or PromptEncoderConfig.encoder_num_layers,
        **_shape(model, settings.num_virtual_tokens),
        **more,
    )


def _prefix(settings: PrefixMethod, **more: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_transformer_submodules=1,
        num_virtual_tokens=settings.num_virtual_tokens,
        prefix_projection=settings.prefix_projection,
        encoder_hidden_size=settings.encoder_hidden_size,
        **more,
    )


def _parameters(encoder: type[nn.Module], config: PromptLearningConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in encoder(config).parameters())
