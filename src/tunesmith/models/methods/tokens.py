"""New tokens' rows in the embeddings and the head, which train beside an adapter."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...errors import ModelError


def where_tokens_train(model: PreTrainedModel, tokens: list[int]) -> list[int] | dict[str, list[int]]:
    """PEFT's trainable_token_indices: the rows of the embeddings, and those of the head where it has its own."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.bias is not None:
        raise ModelError("new tokens cannot train in a head with a bias", where=model.config.model_type, mend="use method full")
    if head.weight is embeddings.weight:
        return tokens
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[embeddings]: tokens, names[head]: tokens}
