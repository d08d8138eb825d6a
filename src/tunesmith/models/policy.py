"""The module that the loop calls: backbone and heads over a forest, giving what an objective needs, per token or per row.

    outputs = policy(forest, needs={"logprobs"})   # TokenOutputs(logprobs[S], ...)

Everything an objective differentiates passes through this forward. The backbone is transformers' own; it runs with our packed attention,
without padding, and the head runs on supervised tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import register_dataclass
from transformers import PreTrainedModel

from ..data.forest import Forest, Node
from ..errors import ModelError
from .adapters import active_adapter
from .attention import FOREST, Layout, forest_layout, in_few_shapes
from .compiled import compile_layers
from .embeddings import plain_lookup, spare_tied_gradient
from .flex import FLEX, FLEX_ATTENTION, flex_masks, use_flex
from .fused import FastPaths, fuse_layers, fuse_lora, keep_plain, plain_layers, remove_fast_forwards
from .grouped import use_grouped
from .head import logit_shape, token_logprobs
from .layout import backbone_of, unpackable_reason
from .offload import offloaded
from .recompute import recompute_layers
from .virtual import virtual_tokens

STEP = 32  # tokens that a batch is filled up to, for products in few shapes


@dataclass(frozen=True)
class TokenOutputs:
    """What a forward pass gives; S supervised tokens and B rows, as the forest numbers them."""

    logprobs: Tensor | None = None
    """[S] fp32, log-probability of each supervised token."""
    entropy: Tensor | None = None
    """[S] fp32, nats, without gradient."""
    values: Tensor | None = None
    """[S] a value head's output at each supervised token's source."""
    scores: Tensor | None = None
    """[B] a reward head's output at each row's last token."""


register_dataclass(TokenOutputs)  # so that what shards a model finds the tensors in it


class _Head(nn.Module):
    """The language head over supervised tokens: a module, so that whoever shards weights by module sees where it is used."""

    def forward(self, hidden_SH: Tensor, head: nn.Module, target_S: Tensor, shape: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """`token_logprobs` of a head's products; `head` may be PEFT's wrapper, which has no bias and does not know the name."""
        return token_logprobs(hidden_SH, head.weight, target_S, bias_V=getattr(head, "bias", None), **shape)


class Policy(nn.Module):
    """A causal language model, with or without adapters, over forests.

    model: transformers' or PEFT's module; fast: whether layers may take their fast paths.
    heads: linear heads on the hidden state by name, `value` and `score`, each giving one number (`heads.py`).
    temperature: what logits are divided by before log-probabilities and entropy are taken. detach_values: whether the value head's gradient
    stays out of the model. activation_offload: whether what the layers keep lies in the host's memory. sharded: whether the base is
    going to be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fast: bool = True,
        gradient_checkpointing: bool | Literal["selective"] = False,
        activation_offload: bool = False,
        temperature: float = 1.0,
        detach_values: bool = True,
        sharded: bool = False,
    ):
        super().__init__()
        self.model = model
        self.temperature, self.detach_values, self.activation_offload = temperature, detach_values, activation_offload
        self.heads, self._head = nn.ModuleDict(), _Head()
        self.whole: Callable[[], AbstractContextManager[None]] = nullcontext
        """For a while every process holds all weights, so that it may compute by itself: to sample answers, or to score them."""
        self.causal: PreTrainedModel
        object.__setattr__(self, "causal", model.get_base_model() if hasattr(model, "get_base_model") else model)
        object.__setattr__(self, "backbone", backbone_of(self.causal))
        self.fast_paths, self._fast_head = FastPaths(), fast
        self.model.eval()  # the base's own dropout is off: log-probabilities are a function of the weights alone
        _train_adapter_dropout(self.model)
        _require_interface(self.causal)
        self.causal.set_attn_implementation(FOREST)
        if self.causal.config._attn_implementation != FOREST:  # transformers only warns
            raise ModelError(
                f"{type(self.causal).__name__} keeps an attention of its own, so rows cannot share a beginning",
                mend="tune another model family",
            )
        if fast:
            if not sharded:
                spare_tied_gradient(self.causal)
            if self.causal.device.type == "cuda":
                use_flex(self.causal, self.fast_paths)
            fuse_layers(self.causal, self.fast_paths)
            if "kernels" in self.fast_paths.used:
                use_grouped(self.causal, self.fast_paths)
            if sharded:
                self.fast_paths.refused["lora"] = "under a strategy that shards, one product of both would hold the base whole once more"
            else:
                fuse_lora(self.model, self.fast_paths)
            if FLEX_ATTENTION in self.fast_paths.used and not sharded:
                compile_layers(self.backbone, self.hidden, self.plain, self.fast_paths)
        if gradient_checkpointing:
            recompute_layers(self.backbone, gradient_checkpointing)

    def forward(self, forest: Forest, needs: Collection[str] = ("logprobs",), *, embeddings: Tensor | None = None) -> TokenOutputs:
        """Runs a batch. needs: any of logprobs, entropy, values, scores. embeddings: [1, T, H] in place of the tokens' own."""
        device = self.causal.device
        hidden_TH = self.hidden(self._embed(forest) if embeddings is None else embeddings, forest)
        source = torch.from_numpy(forest.source_S).to(device)
        hidden_SH = hidden_TH[source]
        logprobs = entropy = values = scores = None
        if "logprobs" in needs or "entropy" in needs:
            shape = self._logit_shape() | {"entropy": "entropy" in needs, "fast": self._fast_head}
            target_S = torch.from_numpy(forest.target_S).to(device)
            logprobs, entropy = self._head(hidden_SH, self.causal.get_output_embeddings(), target_S, shape)
        if "values" in needs:
            values = self.heads["value"]((hidden_SH.detach() if self.detach_values else hidden_SH).float())[:, 0]
        if "scores" in needs:
            scores = self.heads["score"](hidden_TH[torch.from_numpy(forest.last_B).to(device)].float())[:, 0]
        return TokenOutputs(logprobs, entropy, values, scores)

    def last_hidden(self, forest: Forest) -> Tensor:
        """The hidden state [B, H] at each row's last token."""
        return self.hidden(self._embed(forest), forest)[torch.from_numpy(forest.last_B).to(self.causal.device)]

    def _embed(self, forest: Forest) -> Tensor:
        return self.backbone.get_input_embeddings()(torch.from_numpy(forest.tokens_T).to(self.causal.device)[None])

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """For a while, without gradients or dropout, another of the model's adapters is active; None: the bare base."""
        with torch.no_grad(), self.deterministic(), active_adapter(self.model, adapter):
            yield

    @contextmanager
    def plain(self) -> Iterator[None]:
        """For a while, every layer takes its own forward, and attention is computed node by node."""
        attention = self.causal.config._attn_implementation
        self.causal.set_attn_implementation(FOREST)
        fast, self._fast_head = self._fast_head, False
        try:
            with plain_layers(self.model):
                yield
        finally:
            self._fast_head = fast
            self.causal.set_attn_implementation(attention)

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """For a while, the adapters' own dropout is off: outputs are a function of weights and batch alone."""
        dropping = [module for module in self.model.modules() if module.training]
        for module in dropping:
            module.training = False  # each by itself: `eval()` goes through all below it
        try:
            yield
        finally:
            for module in dropping:
                module.training = True

    def make_plain(self) -> None:
        """Takes the fast paths out for good, from what samples with the model as well."""
        remove_fast_forwards(self.model)
        keep_plain(self.causal)
        plain_lookup(self.causal)
        self._fast_head = False
        self.causal.set_attn_implementation(FOREST)
        taken = dict.fromkeys(self.fast_paths.used, "disagrees with the plain layers on the first batch")
        self.fast_paths = FastPaths(refused=self.fast_paths.refused | taken)

    def hidden(self, embeddings_1TH: Tensor, forest: Forest) -> Tensor:
        """The backbone's last hidden states [T, H] for input embeddings [1, T, H].

        An adapter's n learned tokens are an ancestor of every node, computed once. They stand after the batch's tokens, whose places in it
        are what they are without them; their positions are the first.
        """
        positions = torch.from_numpy(forest.positions_T).to(embeddings_1TH.device)[None]
        tokens = embeddings_1TH.shape[1]
        filling = -tokens % STEP if in_few_shapes(embeddings_1TH) else 0
        if filling:  # tokens of no node
            embeddings_1TH, positions = F.pad(embeddings_1TH, (0, 0, 0, filling)), F.pad(positions, (0, filling))
        total, layout = tokens + filling, Layout(forest.nodes)
        virtual = virtual_tokens(self.model, embeddings_1TH.dtype)
        if virtual is not None:
            root = (total, total + virtual.count)
            nodes = [Node(node.start, node.end, (root, *node.ancestors)) for node in forest.nodes]
            positions = positions + virtual.count
            if virtual.embeddings_NH is not None:
                nodes.append(Node(*root, ancestors=()))
                positions = torch.cat([positions, torch.arange(virtual.count, device=positions.device)[None]], 1)
                embeddings_1TH = torch.cat([embeddings_1TH, virtual.embeddings_NH[None]], 1)
            layout = Layout(tuple(nodes), virtual.prefix)
        if self.causal.config._attn_implementation == FLEX:
            queries, windows = embeddings_1TH.shape[1], {None, getattr(self.causal.config.get_text_config(), "sliding_window", None)}
            keys = queries + (virtual.count if virtual is not None and virtual.prefix is not None else 0)
            layout = layout._replace(masks=flex_masks(layout.nodes, queries, keys, windows, embeddings_1TH.device))
        with forest_layout(layout), offloaded(self.model) if self.activation_offload else nullcontext():
            hidden_TH = self.backbone(inputs_embeds=embeddings_1TH, position_ids=positions, use_cache=False).last_hidden_state[0]
        return hidden_TH[:tokens]

    def _logit_shape(self) -> dict[str, float | None]:
        softcap, scale = logit_shape(self.causal.config.get_text_config())
        # cap tanh(x / cap) / T is (cap / T) tanh((x / T) / (cap / T))
        return {"softcap": None if softcap is None else softcap / self.temperature, "scale": scale / self.temperature}


def _train_adapter_dropout(model: nn.Module) -> None:
    """Switches the adapters' own dropout on, and nothing else."""
    for name, module in model.named_modules():
        if ".lora_dropout." in name:
            module.train()


def _require_interface(causal: PreTrainedModel) -> None:
    if not getattr(causal, "_supports_sdpa", False) and not getattr(causal, "_supports_attention_backend", False):
        raise ModelError(
            f"{type(causal).__name__} does not compute attention through transformers' interface, so examples cannot be packed",
            mend="tune another model family",
        )
    reason = unpackable_reason(causal.config)
    if reason:
        raise ModelError(f"examples cannot be packed for {type(causal).__name__}: {reason}", mend="tune another model family")
