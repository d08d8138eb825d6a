"""How a card says that a model is loaded: code that runs as it stands, and what has to be known of an adapter's base.

Plain transformers and PEFT where that gives the model that was trained, and tunesmith.load where it does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models.load import EMBEDDED
from ..models.methods import ADAPTERS


def base_notes(model: dict[str, Any], base: dict[str, Any], config: dict[str, Any], *, published: bool = True) -> list[str]:
    """What whoever loads an adapter must know of its base. model: the recipe's section; base: its identity; config: the adapter's
    `adapter_config.json`; published: as for `loading_code`."""
    notes, file = [], _gguf_file(model)
    if file:
        merges = ADAPTERS[config["peft_type"]].mergeable is None and not model.get("quantization")
        notes.append(
            f"the base is the file {file} (GGUF), converted: on other weights of {base['name']} the adapter answers otherwise, and PEFT "
            f"does not notice. {'The code of README.md reads that file. ' * published}"
            f"{'What `tunesmith export --to merged` writes needs no base' * merges}".removesuffix(". ")
        )
    elif base["revision"] is None:
        notes.append(f"the base has no public name: it is the folder `{base['name']}`, which whoever loads the adapter has to be given too")
    if model.get("quantization"):
        own = "; bitsandbytes' own product rounds the activations too, and tunesmith's does not" if model["quantization"] == "int8" else ""
        notes.append(f"the base is held in {model['quantization']}: on its dense weights the adapter answers otherwise{own}")
    return notes


def loading_code(adapter: str, model: dict[str, Any], base: dict[str, Any], config: dict[str, Any], *, published: bool) -> str:
    """Python that makes `model`. adapter: its folder's name, or its repository on the hub, OWNER/NAME; config: its `adapter_config.json`;
    published: whether it has left the machine where `config` names the base's folder."""
    if _is_beyond_peft(model, config, published):
        given = f", base={json.dumps(_gguf_file(model) or base['name'])}" if published and _has_no_public_name(model, base) else ""
        hub = "from huggingface_hub import snapshot_download\n" if "/" in adapter else ""
        folder = f"snapshot_download({json.dumps(adapter)})" if hub else json.dumps(adapter)
        return f"{hub}import tunesmith\n\nmodel = tunesmith.load({folder}{given}).model"
    quantised = model.get("quantization") is not None
    imports = ["from peft import PeftModel", f"from transformers import AutoModelForCausalLM{', BitsAndBytesConfig' if quantised else ''}"]
    if config["peft_type"] == "BOTTLENECK":
        imports.append("import tunesmith  # PEFT learns the adapter's type from it")
    lines = [f"adapter = {json.dumps(adapter)}  # where adapter_config.json is"]
    if not published:
        imports.insert(0, "import json\n")
        lines.append('folder = json.load(open(f"{adapter}/adapter_config.json"))["base_model_name_or_path"]')
        source = "folder"
    elif (file := _gguf_file(model)) is None:
        source = json.dumps(base["name"]) + (f", revision={json.dumps(base['revision'])}" if base["revision"] else "")
    elif embedded := _embedded(model):
        imports.insert(0, "from importlib.util import find_spec\n")
        lines.append(f"folder = find_spec({json.dumps(embedded.package)}).submodule_search_locations[0]  # {embedded.requirement}")
        source = f"folder, gguf_file={json.dumps(file)}"
    else:
        source = f'".", gguf_file={json.dumps(file)}'
    if quantised:
        dtype = json.dumps(model["dtype"])
        kind = f'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype}'
        lines.append(f"bits = BitsAndBytesConfig({kind})")
        source += f", dtype={dtype}, quantization_config=bits"
    lines += [f"base = AutoModelForCausalLM.from_pretrained({source})", "model = PeftModel.from_pretrained(base, adapter)"]
    return "\n".join([*imports, "", *lines])


def whole_code(folder: str) -> str:
    """Python that makes `model` of whole weights, and its tokenizer. folder: theirs, or their repository on the hub, OWNER/NAME."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"weights = {json.dumps(folder)}  # where config.json is\n"
        "model = AutoModelForCausalLM.from_pretrained(weights)\n"
        "tokenizer = AutoTokenizer.from_pretrained(weights)"
    )


def _is_beyond_peft(model: dict[str, Any], config: dict[str, Any], published: bool) -> bool:
    """Whether the base has to be changed before the adapter fits: other positions, rows for new tokens, bits that transformers computes
    with otherwise (int8) or does not make of a GGUF file."""
    quantization = model.get("quantization")
    changed = model.get("rope_scaling") or config.get("trainable_token_indices") is not None
    return bool(changed or quantization == "int8" or (quantization and published and _gguf_file(model)))


def _embedded(model: dict[str, Any]) -> Any:
    return EMBEDDED.get(model["name"].lower())


def _gguf_file(model: dict[str, Any]) -> str | None:
    """The name of the GGUF file that the base was read from."""
    embedded, path = _embedded(model), Path(model["name"])
    return embedded.file if embedded else path.name if path.suffix == ".gguf" else None


def _has_no_public_name(model: dict[str, Any], base: dict[str, Any]) -> bool:
    return _embedded(model) is None and base["revision"] is None
