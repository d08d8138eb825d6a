"""Which parameters train. One settings class each; a new method adds its class to the union. Names are PEFT's where it has the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ._base import Section

Positive = Annotated[int, Field(ge=1)]
Targets = list[str] | Literal["all-linear"]


class FullMethod(Section):
    """Every parameter trains; fp32 master weights."""

    type: Literal["full"] = "full"
    """The method's name."""


class PartialMethod(Section):
    """Some of the model's own parameters train: named modules, or the last layers; the result is a whole model."""

    type: Literal["partial"] = "partial"
    """The method's name."""
    modules: list[str] | None = None
    """Names of modules whose parameters train, by full name or last parts, each of which must match."""
    last_layers: Positive | None = None
    """Layers at the model's end that train, with the norm after them."""

    @model_validator(mode="after")
    def _something_is_named(self) -> PartialMethod:
        if self.modules is None and self.last_layers is None:
            raise ValueError("partial tuning needs to know what trains: write last_layers: 2, or modules: [...]")
        return self


class LoraMethod(Section):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685); names as in PEFT's LoraConfig. On a quantised base it is QLoRA."""

    type: Literal["lora"] = "lora"
    """The method's name."""
    r: Positive = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale numerator; derived as 2r."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input; above 0 the fused path is off. It is on in sft, reward and best_of_n: the others compare
    log-probabilities without it, and refuse it where they start from the base."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732)."""
    use_dora: bool = False
    """Learn each output's length apart from its direction (DoRA, arXiv:2402.09353)."""
    init_lora_weights: Literal["default", "pissa", "orthogonal"] = "default"
    """How the update starts: default (random A, zero B), pissa (the weight's principal part, arXiv:2404.02948), or orthogonal."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1.0)] = 1.0
    """How many times A's learning rate B's is (LoRA+, arXiv:2402.12354)."""
    target_modules: Targets | None = None
    """Names of the linear layers that get an adapter, each of which must match; derived as every linear layer of the backbone but a
    mixture-of-experts router."""

    @model_validator(mode="after")
    def _two_halves_are_orthogonal(self) -> LoraMethod:
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ValueError(f"r: an orthogonal start has two halves, and {self.r} is odd; write {self.r + 1}")
        return self


class Ia3Method(Section):
    """Learned scales of keys, values and inner activations (Liu et al. 2022, arXiv:2205.05638)."""

    type: Literal["ia3"] = "ia3"
    """The method's name."""
    target_modules: list[str] | None = None
    """Linear layers that get scales; derived as those of keys, values, and the last of each feed-forward part."""
    feedforward_modules: list[str] | None = None
    """Those of them whose input is scaled in place of their output; derived as the last of each feed-forward part."""


class BottleneckMethod(Section):
    """Small networks within the layers (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00052; He et al. 2021,
    arXiv:2110.04366)."""

    type: Literal["bottleneck"] = "bottleneck"
    """The method's name."""
    architecture: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where they stand: after attention and feed-forward (houlsby), after feed-forward (pfeiffer), or beside it (parallel)."""
    bottleneck_size: Positive = 64
    """Units between the two projections."""
    non_linearity: Literal["relu", "gelu", "silu"] = "relu"
    """What stands between the two projections."""
    scaling: Annotated[float, Field(gt=0)] | None = None
    """What the output is multiplied by; derived as 4 for parallel, else 1."""


class PrefixMethod(Section):
    """Learned keys and values before every layer's own (prefix tuning, Li & Liang 2021, arXiv:2101.00190)."""

    type: Literal["prefix"] = "prefix"
    """The method's name."""
    num_virtual_tokens: Positive = 20
    """Length of the prefix."""
    prefix_projection: bool = False
    """Whether a small network makes the prefix while it trains; the result is the prefix, and beside it the network, for a later stage."""
    encoder_hidden_size: Positive | None = None
    """That network's width; derived as the model's."""

    @model_validator(mode="after")
    def _width_of_a_network(self) -> PrefixMethod:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is a network's width, and there is none: add prefix_projection: true, or leave it out")
        return self


class PromptMethod(Section):
    """Learned embeddings before every row (prompt tuning, Lester et al. 2021, arXiv:2104.08691)."""

    type: Literal["prompt"] = "prompt"
    """The method's name."""
    num_virtual_tokens: Positive = 20
    """Length of the learned prompt."""
    prompt_tuning_init_text: str | None = None
    """Text whose tokens' embeddings it starts from, repeated or cut to its length; else random tokens'."""


class PTuningMethod(Section):
    """Learned embeddings before every row, made by a small network (P-tuning, Liu et al. 2021, arXiv:2103.10385)."""

    type: Literal["p_tuning"] = "p_tuning"
    """The method's name."""
    num_virtual_tokens: Positive = 20
    """Length of the learned prompt."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network's kind."""
    encoder_hidden_size: Positive | None = None
    """Its width; derived as the model's."""
    encoder_num_layers: Positive | None = None
    """Layers of an LSTM; derived as 2."""

    @model_validator(mode="after")
    def _layers_of_an_lstm(self) -> PTuningMethod:
        if self.encoder_num_layers is not None and self.encoder_reparameterization_type != "LSTM":
            raise ValueError("encoder_num_layers counts an LSTM's layers, and an MLP has three always: leave it out")
        return self


Method = Annotated[
    FullMethod | PartialMethod | LoraMethod | Ia3Method | BottleneckMethod | PrefixMethod | PromptMethod | PTuningMethod,
    Field(discriminator="type"),
]
IS_TYPE_WITH = {
    "qlora": "method: lora, with `model.quantization: nf4`",
    "dora": "method: {type: lora, use_dora: true}",
    "rslora": "method: {type: lora, use_rslora: true}",
    "pissa": "method: {type: lora, init_lora_weights: pissa}",
    **{name: f"method: {{type: bottleneck, architecture: {name}}}" for name in ("houlsby", "pfeiffer", "parallel")},
}
"""What to write for methods that are known by names of their own and are another type with a setting."""
WHOLE = ("full", "partial")
"""Methods whose result is a whole model, and not an adapter."""


def virtual_tokens_of(method: Method | None) -> int:
    """How many learned tokens a method puts before every row."""
    return getattr(method, "num_virtual_tokens", 0)
