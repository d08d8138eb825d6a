"""More rows in a model's embeddings, for tokens that a chat template brings."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Gives embeddings and head as many rows, where they have fewer; the new ones are the mean of the old: the same in every process, and
    no outliers."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[old:] = layer.weight[:old].mean(0, dtype=torch.float32).to(layer.weight.dtype)
