"""Embeddings: more rows, for tokens that a chat template brings, and the gradient of a table that is the head too."""

from __future__ import annotations

import torch
from torch import nn
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


def spare_tied_gradient(model: PreTrainedModel) -> None:
    """Where a CPU trains one table as embeddings and head, the embeddings' gradient names the batch's tokens alone.

    Autograd adds it into the head's, in place of zeros of the table's size that are filled and added.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, nn.Embedding) and head is not None and getattr(head, "weight", None) is table.weight:
        table.sparse = table.weight.requires_grad and table.weight.device.type == "cpu"
