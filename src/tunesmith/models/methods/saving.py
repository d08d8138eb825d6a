"""How a result is saved and strictly loaded again.

A result's folder is a plain PEFT adapter or a plain transformers model in safetensors, with tokenizer and chat template, and
`tunesmith.json`, which holds the base's identity and the template's hash.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...errors import AdapterError
from ..adapters import POLICY, adapter_parameters, keeping_what_trains
from ..bottleneck import REFUSED
from ..heads import save_heads
from ..load import LoadedModel, quiet
from ..peft_extension import BOTTLENECK
from ..result import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, read_adapter_config, read_card
from ..virtual import has_network, load_network, save_network, show_new_tokens
from .tokens import FIELD, mark_tokens, saved_config


def put_adapter(model: PreTrainedModel, config: PeftConfig, *, seed: int | None = None) -> PeftModel:
    """A fresh adapter on a model; from a seed where one is given."""
    if seed is not None:
        torch.manual_seed(seed)
    with warnings.catch_warnings():  # PEFT asks for what transformers has renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
    show_new_tokens(tuned)
    return tuned


def trainable_state(model: nn.Module, adapter: str = POLICY) -> dict[str, torch.Tensor]:
    """The trained tensors by their names in the saved file: an adapter's, or the whole model's; of one that is sharded, every process has
    to ask."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
        return {name: tensor.detach().contiguous() for name, tensor in state.items()}
    state = model.state_dict()
    tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[Any, torch.Tensor] = {}  # of what is tied, one tensor stands under several names
    for name, tensor in state.items():
        if tied.get(name, name) not in found:
            found[tied.get(name, name)] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    return {name: found[tied.get(name, name)] for name in state}


def save_result(
    model: nn.Module,
    loaded: LoadedModel,
    folder: Path,
    card: dict[str, Any],
    heads: nn.ModuleDict | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a result into a folder that exists (the caller makes it atomic), then reads it back: names, shapes, bytes.

    state: `trainable_state` of a model that is sharded, for which one process alone cannot ask.
    """
    gathered, state = state, state or trainable_state(model)
    if isinstance(model, PeftModel):
        save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = saved_config(model.peft_config[POLICY])
        config["inference_mode"], config["base_model_name_or_path"] = True, loaded.identity.folder
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=_plain))
    else:
        with quiet():
            model.save_pretrained(folder, state_dict=gathered and dict(gathered))  # it takes them out of the dict
    _reopen(folder, state, renamed=not isinstance(model, PeftModel))
    if isinstance(model, PeftModel):
        save_network(model, POLICY, folder)
    save_heads(heads or nn.ModuleDict(), folder)
    loaded.tokenizer.save_pretrained(folder)
    base = {"base": loaded.identity.public(), "quantization": loaded.quantization, "rope_scaling": loaded.rope_scaling}
    (folder / CARD).write_text(json.dumps({**base, **card}, indent=2, sort_keys=True))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _reopen(folder: Path, state: dict[str, torch.Tensor], *, renamed: bool) -> None:
    """Reads the written weights back, a file at a time; of tensors that are one in memory (tied), one name is enough.

    renamed: whether transformers may have written a layout of its own (experts apart that are one tensor in memory), so that what has
    other names is counted only.
    """
    missing, other = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}, 0
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if name not in state:
                other += tensor.numel()
            elif torch.equal(tensor, state[name].cpu()):
                missing.pop(state[name].data_ptr(), None)
    if sum(missing.values()) != other or (other and not renamed) or not all(tensor.numel() for tensor in state.values()):
        raise AdapterError("the written file does not read back as the weights in memory", where=str(folder), mend="check the disk")


def load_adapter(loaded: LoadedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
    """Puts a saved adapter on its base. Every tensor must be there, of the right shape, and the base must be the one it was trained on.

    Raises AdapterError. PEFT itself accepts a file with missing keys and leaves those layers untrained.
    """
    config, have = _read_adapter(loaded, folder)
    config.inference_mode = not trainable
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = "RANDOM"  # filled below; PEFT would load a tokenizer by name for a text
    with _fitting(folder):
        model = put_adapter(loaded.model, config)
    _fill(model, POLICY, have, folder)
    for parameter in adapter_parameters(model, POLICY).values():
        parameter.requires_grad_(trainable)
    return model.eval()


def add_adapter(model: PeftModel, loaded: LoadedModel, folder: Path, name: str) -> None:
    """Puts a saved adapter, frozen, beside a model's own, under a name; on the same conditions as `load_adapter`."""
    config, have = _read_adapter(loaded, folder)
    with keeping_what_trains(model):
        with _fitting(folder):
            model.add_adapter(name, config)
        _fill(model, name, have, folder)


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, LookupError, AttributeError) as error:
        mend = "load the base it was trained on"
        raise AdapterError(f"the adapter does not fit the model: {error}", where=str(folder), mend=mend) from error


def _read_adapter(loaded: LoadedModel, folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """A saved adapter's config and tensors, if it was trained on this base."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise AdapterError(f"no {ADAPTER_WEIGHTS}", where=str(folder), mend="name a run, a stage's model folder or a PEFT adapter")
    card = read_card(folder)
    if card and card.get("quantization") != loaded.quantization:
        held = card.get("quantization")
        raise AdapterError(
            f"trained on a base held in {held or 'its dtype'}, and this one is held in {loaded.quantization or 'its dtype'}",
            where=str(folder),
            mend=f"set model.quantization: {held or 'null'}: it learned to make up for the rounding of the base it was trained on",
        )
    if card and card.get("rope_scaling") != loaded.rope_scaling:
        trained, given = (json.dumps(scaling, sort_keys=True) for scaling in (card.get("rope_scaling"), loaded.rope_scaling))
        raise AdapterError(
            f"trained on a base whose positions are scaled by {trained}, and this one's are by {given}",
            where=str(folder),
            mend=f"set model.rope_scaling: {trained}: elsewhere a token would stand at another place",
        )
    expected = card.get("base", {}).get("sha256")
    if expected and expected != loaded.identity.sha256:
        raise AdapterError(
            f"trained on another base (its weights hash to {expected[:12]}, these to {loaded.identity.sha256[:12]})",
            where=str(folder),
            mend=f"load {card['base'].get('name')} in the revision it was trained on",
        )
    if REFUSED and read_adapter_config(folder).get("peft_type") == BOTTLENECK:
        raise AdapterError(f"a bottleneck adapter cannot be loaded: {REFUSED}", where=str(folder), mend="install PEFT 0.21")
    try:
        with warnings.catch_warnings():  # PEFT tells of the fields that a config's class has not: new tokens' is set here
            warnings.filterwarnings("ignore", message=f".*{FIELD}")
            config, have = PeftConfig.from_pretrained(str(folder)), load_file(weights)
        mark_tokens(config, read_adapter_config(folder).get(FIELD))
        _start_plainly(config, folder)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError) as error:
        mend = f"it needs a PEFT {ADAPTER_CONFIG} and whole weights"
        raise AdapterError(f"the adapter cannot be read: {error}", where=str(folder), mend=mend) from error
    return config, have


def _start_plainly(config: PeftConfig, folder: Path) -> None:
    """Every tensor is read from the file, so none needs a start of its own; one that PEFT takes out of the base would change the base."""
    start = getattr(config, "init_lora_weights", None)
    if start not in (None, True, False, "gaussian", "orthogonal"):
        raise AdapterError(
            f"it was trained on a base that its start had changed (init_lora_weights: {start})",
            where=str(folder),
            mend="convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)",
        )
    if start is not None:
        vars(config)["init_lora_weights"] = True


def _fill(model: PeftModel, adapter: str, have: dict[str, torch.Tensor], folder: Path) -> None:
    """Puts saved tensors into an adapter, in fp32; all of them, and no others."""
    want = trainable_state(model, adapter)
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    other = [name for name in want.keys() & have.keys() if want[name].shape != have[name].shape]
    if missing or extra or other:
        what = f"missing {missing[:2]}" if missing else f"unexpected {extra[:2]}" if extra else f"shape of {other[0]}"
        raise AdapterError(
            f"the adapter's tensors do not match the model: {what}",
            where=str(folder / ADAPTER_WEIGHTS),
            mend="the file is damaged or of another model",
        )
    if has_network(model, adapter):
        have = have | {"prompt_embeddings": load_network(model, adapter, have["prompt_embeddings"], folder)}
    set_peft_model_state_dict(model, have, adapter_name=adapter)
    for parameter in adapter_parameters(model, adapter).values():
        parameter.data = parameter.data.float()
