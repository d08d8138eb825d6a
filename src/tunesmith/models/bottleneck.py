"""Bottleneck adapters as a PEFT method: config, layer and model, which PEFT saves, loads, switches and freezes like its own.

A small network of two projections adds to a decoder layer, y + s U f(D x). After attention's output and after the feed-forward's: Houlsby
et al. 2019 (arXiv:1902.00751); after the feed-forward's alone: Pfeiffer et al. 2020 (arXiv:2005.00052); there x is y. Beside the
feed-forward, whose input it reads: He et al. 2021 (arXiv:2110.04366). All stand before the residual sum, and before the norm that some
models (Gemma) have there. D starts random, U at zero, so that a fresh one changes nothing.

Importing this module makes the type known to PEFT; `import tunesmith` sees to it (peft_extension.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .peft_extension import BOTTLENECK, register
from .structure import sublayers

NOT_MERGEABLE = "its layers are not linear: no weight of the model's holds them"


@dataclass
class BottleneckConfig(PeftConfig):
    """A bottleneck adapter as PEFT saves it. The modules are found by the model's structure where they are not given."""

    architecture: str = "pfeiffer"
    """houlsby, pfeiffer or parallel."""
    bottleneck_size: int = 64
    """Units between the two projections."""
    non_linearity: str = "relu"
    """A function of torch.nn.functional: relu, gelu or silu."""
    scaling: float = 1.0
    """What the added part is multiplied by."""
    target_modules: list[str] | None = None
    """The linear layers to whose output it is added."""
    input_modules: dict[str, str] | None = None
    """parallel: by each target's full name, that of the linear layer whose input the adapter reads."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose embeddings train besides."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(BOTTLENECK)


class Bottleneck(nn.Module):
    """x[..., H] -> s U f(D x), computed in x's dtype; its own weights may be held in another."""

    def __init__(self, width: int, config: BottleneckConfig):
        super().__init__()
        self.down, self.up = nn.Linear(width, config.bottleneck_size), nn.Linear(config.bottleneck_size, width)
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)
        self.between, self.scaling = getattr(F, config.non_linearity), config.scaling
        self.parallel = config.architecture == "parallel"

    def forward(self, x: Tensor) -> Tensor:
        """What is added: [..., H]."""
        low = self.between(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        return F.linear(low * self.scaling, self.up.weight.to(x.dtype), (self.up.bias * self.scaling).to(x.dtype))


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear layer, to whose output the active adapters add theirs in turn."""

    adapter_layer_names = ("bottleneck_adapter",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapter = nn.ModuleDict()
        self._input: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def add(self, name: str, config: BottleneckConfig) -> None:
        """A fresh adapter."""
        base = self.get_base_layer()
        self.bottleneck_adapter[name] = Bottleneck(base.nf if isinstance(base, Conv1D) else base.out_features, config)
        self._move_adapter_to_device_of_base_layer(name)

    def read_input_of(self, module: nn.Module) -> None:
        """Gives parallel adapters what a module reads, which is called before this one."""
        self.read_no_input()
        self._hook = module.register_forward_pre_hook(self._keep)

    def read_no_input(self) -> None:
        """Takes that back."""
        if self._hook is not None:
            self._hook.remove()

    def _keep(self, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._input = given[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x[..., K] -> [..., H]."""
        read, self._input = self._input, None
        y = self.base_layer(x, *args, **kwargs)
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.bottleneck_adapter:
                adapter = self.bottleneck_adapter[name]
                if adapter.parallel and read is None:
                    raise ModelError("a parallel adapter was not shown the feed-forward's input: the layer that reads it was not called")
                y = y + adapter(read if adapter.parallel else y)
        return y


class BottleneckModel(BaseTuner):
    """Puts bottleneck adapters on a model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict[str, Any]) -> BottleneckConfig:
        if peft_config.target_modules is None:
            layers = sublayers(self.model)
            attention = [layer.attention_output for layer in layers] if peft_config.architecture == "houlsby" else []
            peft_config.target_modules = attention + [layer.feedforward_output for layer in layers]
            if peft_config.architecture == "parallel":
                peft_config.input_modules = {layer.feedforward_output: layer.feedforward_inputs[0] for layer in layers}
        return peft_config

    def _create_and_replace(
        self, peft_config: BottleneckConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str
    ) -> None:
        layer = target
        if not isinstance(layer, BottleneckLayer):
            layer = BottleneckLayer(target)
            self._replace_module(parent, target_name, layer, target)
        layer.add(adapter_name, peft_config)
        if peft_config.architecture == "parallel":
            layer.read_input_of(self.model.get_submodule(peft_config.input_modules[current_key]))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """A parameter's name in a saved file: PEFT looks for the adapter's name elsewhere, one level further down."""
        return key.replace(f".bottleneck_adapter.{adapter_name}.", ".bottleneck_adapter.")

    def _check_merge_allowed(self) -> None:
        raise ValueError(f"a bottleneck adapter cannot be merged: {NOT_MERGEABLE}")

    def unload(self) -> nn.Module:
        """The model without its adapters."""
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer):
                module.read_no_input()
        return super().unload()


REFUSED = register(BottleneckConfig, BottleneckModel)
"""Why the installed PEFT does not know the type, or None."""
