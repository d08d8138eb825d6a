"""What a method costs beside the model's own forward pass, told from its settings and the model, for the plan.

A trained number on the tokens' way costs two operations forward and four backward, whatever the method; what differs is how far the
backward pass goes, which frozen weights' gradients it spares, and what is kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from ..recipe import WHOLE, Method
from .methods import trainable_count
from .methods.targets import layer_size, targeted

DROPPED = 3.3  # times an adapter's input that dropout keeps of it: the mask, what is left, and what lies between; fitted
WIDE_INPUTS, WIDE_OUTPUTS = 2.0, 3.5  # times DoRA's inputs and outputs that are kept in fp32 beside a 16-bit model's; fitted
JOINED = 5  # times a LoRA product's inputs are read or written beside it: joined with x A^T, and their gradient cut apart and added to
DORA_INPUTS, DORA_OUTPUTS = 8.0, 40.0  # times that PEFT's DoRA reads or writes inputs and outputs, step by step in fp32; fitted
COMPUTED_TOKENS = ("prompt", "p_tuning")  # methods whose learned tokens go through the layers; a prefix is keys and values alone


@dataclass(frozen=True)
class MethodCost:
    """A method on a model."""

    trainable: int
    """Numbers that train."""
    whole: bool
    """Whether they are the model's own, with fp32 masters beside them; else an adapter's, in fp32."""
    weight_gradients: float = 0.0
    """Which share of the linear layers' weights gets a gradient."""
    depth: float = 1.0
    """Which share of the layers the backward pass goes through."""
    per_token: int = 0
    """Trained numbers that each token is multiplied with."""
    saved_inputs: int = 0
    """Numbers kept for the backward pass for each token, beside the frozen model's."""
    passed_in_16_bits: int = 0
    """Numbers read or written for each token beside the frozen model's, outside products, which a CPU in 16 bits feels: its products are
    fast. In fp32 BESIDE was fitted without them."""
    weight_passes: float = 0.0
    """Times that the targets' weights are read or written anew for each batch: the norms of DoRA."""
    copied: int = 0
    """Frozen weights that a fast path copies."""
    virtual_tokens: int = 0
    """Learned tokens, which all rows of a batch share."""


def method_cost(model: PreTrainedModel, method: Method) -> MethodCost:
    """The cost of a resolved method."""
    trainable = trainable_count(model, method)
    if method.type in WHOLE:
        layers = model.config.get_text_config().num_hidden_layers
        depth = min(1.0, (getattr(method, "last_layers", None) or layers) / layers)
        share = min(1.0, trainable / sum(p.numel() for p in model.parameters()))
        return MethodCost(trainable, True, weight_gradients=1.0 if method.type == "full" else share, depth=depth)
    if method.type in COMPUTED_TOKENS:
        return MethodCost(trainable, False, virtual_tokens=method.num_virtual_tokens)
    if method.type == "prefix":
        return MethodCost(trainable, False)
    if method.type != "lora":
        return MethodCost(trainable, False, per_token=trainable)
    wide = 4 / model.get_input_embeddings().weight.element_size()  # PEFT's own layers compute in fp32 whatever the model does
    targets = [layer_size(layer) for layer in targeted(model, method.target_modules).values()]
    inputs, outputs = (sum(size[side] for size in targets) for side in (0, 1))
    saved = method.r * len(targets)
    if method.lora_dropout:
        saved += int(DROPPED * inputs * wide)
    if method.use_dora:
        saved += 2 * outputs  # the base's output and the update's, each for the length's gradient
        saved += int((wide - 1) * (WIDE_INPUTS * inputs + WIDE_OUTPUTS * outputs))
    plain = not method.lora_dropout and not method.use_dora
    copied = sum(a * b for a, b in targets) if plain else 0
    passes = 12.0 * wide if method.use_dora else 0.0
    passed = JOINED * inputs if plain else 0
    if method.use_dora:
        passed = int(wide * (DORA_INPUTS * inputs + DORA_OUTPUTS * outputs))
    return MethodCost(
        trainable, False, per_token=trainable, saved_inputs=saved, passed_in_16_bits=passed, weight_passes=passes, copied=copied
    )
