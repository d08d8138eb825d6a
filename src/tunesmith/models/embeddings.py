"""Embeddings: more rows, for tokens that a chat template brings, and the gradient of a table that is the head too."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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


class _Lookup(torch.autograd.Function):
    """Rows of a table; its gradient names the tokens that occur, each once, their sums taken in fp32 and rounded once."""

    @staticmethod
    def forward(ctx, weight, tokens, padding):  # noqa: ANN001
        ctx.save_for_backward(tokens)
        ctx.shape, ctx.padding = weight.shape, padding
        return nn.functional.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        (tokens,) = ctx.saved_tensors
        named, place = tokens.reshape(-1).unique(return_inverse=True)
        sums = torch.zeros(len(named), ctx.shape[1], dtype=torch.float32).index_add_(0, place, grad.reshape(-1, ctx.shape[1]).float())
        if ctx.padding is not None:  # torch's embeddings give that token no gradient
            sums[named == ctx.padding] = 0
        found = torch.sparse_coo_tensor(named[None], sums.to(grad.dtype), ctx.shape, is_coalesced=True, check_invariants=False)
        return found, None, None


def _lookup(self: nn.Embedding, tokens: Tensor) -> Tensor:
    return _Lookup.apply(self.weight, tokens, self.padding_idx)


def spare_tied_gradient(model: PreTrainedModel) -> None:
    """Where a CPU trains one table as embeddings and head, the embeddings' gradient names the batch's tokens alone.

    Autograd adds it into the head's, in place of zeros of the table's size that are filled and added.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(table) is not nn.Embedding or getattr(head, "weight", None) is not table.weight:
        return
    if table.weight.requires_grad and table.weight.device.type == "cpu" and table.max_norm is None:
        table.forward = types.MethodType(_lookup, table)


def plain_lookup(model: PreTrainedModel) -> None:
    """Takes that back."""
    vars(model.get_input_embeddings()).pop("forward", None)
