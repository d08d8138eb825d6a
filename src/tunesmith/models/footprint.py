"""The peak of memory in its parts, in bytes: weights, gradients, optimiser, activations, logits, rollouts, libraries.

Their sum is the peak. Constants that no shape gives are named below; they were fitted on a 135M Llama on CPU in fp32, LoRA and full, at
batches of 1 to 32 rows.
"""

from __future__ import annotations

import torch

from ..recipe import Stage
from .attention import KEY_STEP
from .costs import MethodCost
from .head import room_on
from .roofline import RECOMPUTED, Shape, on_cpu_in_16_bits

SAVED_HIDDEN, SAVED_INNER = 11, 3  # vectors of each width that the backward pass keeps, per token and layer
# Times those, on a CPU in 16 bits: kernels that are made between activations stay, and leave holes of ever other sizes. LoRA on 135M: 1.6
# after 8 updates, 1.8 after 40; learned prompts 1.0.
HOLES_IN_16_BITS, HOLES_OF_SEVERAL = 1.4, 2.2  # where an update is one batch, or several of ever other sizes
PLAIN_HIDDEN, PLAIN_INNER = 24, 7  # the same without the fast paths, with which they are compared before the first update
CHECKPOINTED_HIDDEN = 4  # what checkpointing leaves of them: a layer's input, and holes that the allocator cannot fill; from LoRA, 8 rows
BESIDE_MASTERS = 1.0  # times the fp32 masters: the loaded weights, which are held until every master is made
HEAD_CHUNKS = 4  # the head's logits of a chunk and what is made of them, each as large
PASSED_HIDDEN, PASSED_INNER = 9, 4  # vectors of each width that a forward pass without gradients holds at once, per token, in one layer
LOGIT_COPIES = 3  # fp32 logits and what is made of them, at once
SCATTERED = 1.5  # what the process holds for each byte in use while generating: freed blocks that nothing of their size has taken again
# Bytes of the kernels that a CPU in 16 bits has made by an evaluation's end, one for each shape of a product, training's among them. 135M
# with AMX: what two runs held beyond the other parts.
KERNELS_IN_16_BITS = 450 * 2**20
LIBRARIES = 150 * 2**20  # bytes that libraries take once they really work
MOMENTS = {"adamw_torch_fused": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 2.0, "adafactor": 0.0, "muon": 4.0}
"""Bytes that an update rule keeps of a trained number, of a model that is mostly matrices."""

Footprint = dict[str, int]


def train_footprint(
    shape: Shape, stage: Stage, cost: MethodCost, *, bare: int, batch_tokens: int, probe_tokens: int = 0, mapped: bool = False
) -> Footprint:
    """A stage's peak: the bare process, the model, the trained state, and the largest batch's activations.

    bare: bytes held before the model. batch_tokens: computed tokens of the largest batch; probe_tokens: of the rows on which fast and plain
    layers are compared. mapped: whether the weights' file is mapped as it is, so that what a fast path copies is held twice.
    """
    added_up = (stage.gradient_accumulation_steps or 1) > 1
    vectors = SAVED_HIDDEN * shape.hidden + SAVED_INNER * shape.inner
    again = shape.layers * cost.depth * RECOMPUTED[stage.gradient_checkpointing or False]
    layers = shape.layers * cost.depth - again + (1 if again else 0)  # of those computed again, one at a time
    kept = again * CHECKPOINTED_HIDDEN * shape.hidden
    if stage.activation_offload:  # one layer at a time; the others' lie in the host's memory, which is not counted
        layers, kept = 1, 0
    saved = batch_tokens * (layers * vectors + cost.saved_inputs * layers / shape.layers + kept) * shape.itemsize
    if on_cpu_in_16_bits(shape):
        saved += int(((HOLES_OF_SEVERAL if added_up else HOLES_IN_16_BITS) - 1) * vectors) * batch_tokens * layers * shape.itemsize
    if not cost.whole:
        saved += shape.linear // shape.layers * shape.itemsize  # a layer's weights while they move beside the update's
    room = room_on("cuda" if torch.cuda.is_available() else "cpu")
    logits = HEAD_CHUNKS * room.chunk
    if cost.weight_gradients == 1.0:  # the logits' gradient of many chunks, in the model's dtype, and the head's own in fp32
        logits += room.trained * shape.itemsize // 4 + shape.vocabulary * shape.hidden * 4
    else:
        logits += room.frozen * shape.itemsize // 4
    halved = cost.whole and shape.itemsize == 2
    parts = {
        "weights": shape.weights + (0 if cost.whole else 4 * cost.trainable) + (cost.copied * shape.itemsize if mapped else 0),
        "gradients": cost.trainable * (2 if halved and not added_up else 4),
        "optimiser": int(cost.trainable * (MOMENTS[stage.optim] + (2 if halved else 0))),
        "activations": int(saved),
        "logits": logits,
        "rollouts": 0,
        "libraries": bare + LIBRARIES,
    }
    if not (stage.gradient_checkpointing or stage.activation_offload):
        # the comparison comes before the optimiser, goes back to the embeddings whatever trains, and holds both sides' gradients
        plain = cost.depth * (PLAIN_HIDDEN * shape.hidden + PLAIN_INNER * shape.inner) + (1 - cost.depth) * vectors
        plain *= probe_tokens * shape.layers * shape.itemsize
        beyond = int(plain) + parts["gradients"] - parts["optimiser"] - parts["activations"]
        parts["activations"] += max(0, beyond)
    if cost.whole and not halved:  # the optimiser is built before an update has activations
        parts["activations"] += max(0, int(BESIDE_MASTERS * 4 * cost.trainable) - parts["activations"] - parts["logits"])
    return parts


def generation_bytes(
    shape: Shape,
    *,
    items: int,
    batch_size: int,
    prompt_tokens: float,
    new_tokens: int,
    batch_tokens: int,
    logit_elements: int,
) -> int:
    """Bytes of answering and scoring `items` prompts: the cache of a batch, one pass over its prompts, its logits.

    prompt_tokens: of the longest prompt, without what all prompts begin with. new_tokens: of the longest answer. batch_tokens,
    logit_elements: the engine's limits (generate.engine's BATCH_TOKENS and LOGIT_ELEMENTS).
    """
    row = prompt_tokens + new_tokens
    rows = max(1, min(batch_size, items, int(batch_tokens // row)))
    cache = rows * (row + (KEY_STEP if on_cpu_in_16_bits(shape) else 0)) * shape.cached * shape.itemsize
    passed = rows * row * (PASSED_HIDDEN * shape.hidden + PASSED_INNER * shape.inner) * shape.itemsize
    logits = max(rows, min(rows * new_tokens, logit_elements // shape.vocabulary)) * shape.vocabulary * (4 * LOGIT_COPIES + shape.itemsize)
    return int(LIBRARIES + SCATTERED * (cache + max(passed, logits)))
