"""Loading a base: every weight from the file, safetensors only, no remote code, GGUF converted once, hub names pinned."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.gguf_file import write_gguf
from tests.toys import model_folder
from transformers import AutoModelForCausalLM

from tunesmith.errors import ModelError, StorageFailed
from tunesmith.models import load
from tunesmith.models.load import Embedded, load_model
from tunesmith.recipe import ModelSection

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "tiny-llama")


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "tiny-llama"))


def section(name: Path | str, **settings) -> ModelSection:
    return ModelSection(name=str(name), dtype="float32", **settings)


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_sound_folder_is_loaded_with_its_tokenizer_and_identity(sound):
    loaded = load_model(section(sound))
    for name, tensor in load_file(sound / "model.safetensors").items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert (loaded.dtype, loaded.context, loaded.model.training) == (torch.float32, 512, False)
    assert loaded.tokenizer.chat_template
    assert loaded.identity.name == "tiny-llama"
    assert loaded.identity.revision is None
    assert str(sound.parent) not in json.dumps(loaded.identity.public())


def test_the_identity_is_that_of_the_weights_alone(sound, folder):
    before = load_model(section(sound)).identity.sha256
    assert load_model(section(folder)).identity.sha256 == before
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    assert load_model(section(folder)).identity.sha256 != before


def rename_prefix(tensors):
    for name in list(tensors):
        tensors["wrapped." + name] = tensors.pop(name)


def rename_one_layer(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.7.")] = tensors.pop(name)


def drop_one(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight"]


def drop_embeddings(tensors):
    del tensors["model.embed_tokens.weight"]


def other_shape(tensors):
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 32)


@pytest.mark.parametrize("change", [rename_prefix, rename_one_layer, drop_one, drop_embeddings, other_shape])
def test_weights_that_would_be_filled_with_random_numbers_are_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(ModelError) as caught:
        load_model(section(folder))
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("damage", ["truncated", "emptied", "text"])
def test_a_damaged_weight_file_is_a_model_error(folder, damage):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes({"truncated": data[: len(data) // 2], "emptied": b"", "text": b"version https://git-lfs.github.com/spec/v1\n"}[damage])
    with pytest.raises(ModelError):
        load_model(section(folder))


def without_tokenizer(folder):
    for file in folder.glob("*tokenizer*"):
        file.unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def torn_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden')


def wrong_type_in_config(folder):
    edit(folder / "config.json", hidden_size="wide")


def unknown_architecture(folder):
    edit(folder / "config.json", model_type="nonesuch", architectures=["Nonesuch"])


def torn_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def an_adapter(folder):
    without_config(folder)
    (folder / "adapter_config.json").write_text("{}")


UNUSABLE = {
    "an adapter": (an_adapter, "it holds an adapter: name its base here, and put start_from"),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "no config": (without_config, "config.json"),
    "torn config": (torn_config, ""),
    "wrong type": (wrong_type_in_config, ""),
    "unknown architecture": (unknown_architecture, "nonesuch"),
    "torn tokenizer": (torn_tokenizer, ""),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_unusable_folder_is_a_model_error_that_says_what_is_wrong(folder, what):
    spoil, word = UNUSABLE[what]
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load_model(section(folder))
    assert word in str(caught.value)
    assert caught.value.mend


@pytest.mark.parametrize("name", ["nonesuch", "./nonesuch", "/no/such/folder", "nonesuch.gguf", "a/b/c"])
def test_a_name_that_is_nothing_is_a_model_error(name):
    with pytest.raises(ModelError, match=r"no (model|such)"):
        load_model(section(name))


class Payload:
    """Unpickled, it leaves a marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_folder_with_pickled_weights_only_is_refused_and_nothing_is_unpickled(folder, tmp_path):
    marker = tmp_path / "unpickled"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Payload(marker)}))
    with pytest.raises(ModelError, match="safetensors"):
        load_model(section(folder))
    assert not marker.exists()


def auto_map_of_the_model(folder, code):
    edit(
        folder / "config.json",
        model_type="evil",
        architectures=["Evil"],
        auto_map={"AutoConfig": f"{code}.C", "AutoModelForCausalLM": f"{code}.M"},
    )


def auto_map_of_a_known_model(folder, code):
    edit(folder / "config.json", auto_map={"AutoConfig": f"{code}.C", "AutoModelForCausalLM": f"{code}.M"})


def auto_map_of_the_tokenizer(folder, code):
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [f"{code}.T", f"{code}.T"]})


def custom_generation(folder, code):
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / f"{code}.py", folder / "custom_generate" / "generate.py")
    edit(folder / "generation_config.json", custom_generate=str(folder))


def attention_kernel(folder, code):
    edit(folder / "config.json", attn_implementation=f"{folder}/kernel", _attn_implementation=f"{folder}/kernel")
    (folder / "kernel").mkdir()
    shutil.copy(folder / f"{code}.py", folder / "kernel" / "__init__.py")


@pytest.mark.parametrize(
    "attack", [auto_map_of_the_model, auto_map_of_a_known_model, auto_map_of_the_tokenizer, custom_generation, attention_kernel]
)
def test_code_in_a_models_folder_is_never_imported(folder, tmp_path, monkeypatch, attack):
    marker = tmp_path / "imported"
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "evil_code.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nclass C: pass\nclass M: pass\nclass T: pass\n"
    )
    if not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text("{}")
    attack(folder, "evil_code")
    with contextlib.suppress(ModelError):  # refusing is as good as loading without it
        load_model(section(folder))
    assert not marker.exists()
    assert not any("evil_code" in name for name in sys.modules)


@pytest.fixture
def gguf_file(sound, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", sound)
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_converted_once_into_the_cache_weight_for_weight(gguf_file, sound, tmp_path, monkeypatch):
    first = load_model(section(gguf_file))
    for name, tensor in load_file(sound / "model.safetensors").items():
        assert torch.equal(first.model.state_dict()[name], tensor), name
    assert first.identity.name == "tiny"
    assert Path(first.identity.folder).is_relative_to(tmp_path / "cache")
    assert first.tokenizer.chat_template
    plain = AutoModelForCausalLM.from_pretrained

    def no_gguf(*args, **kwargs):
        assert "gguf_file" not in kwargs, "converted a second time"
        return plain(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_gguf)
    second = load_model(section(gguf_file))
    assert second.identity == first.identity


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["mkdir", "TemporaryFile"])
def test_a_cache_that_cannot_be_written_is_named_before_anything_is_converted(gguf_file, tmp_path, monkeypatch, number, call):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((Path, "mkdir") if call == "mkdir" else (load.tempfile, "TemporaryFile")), refuse)
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", None)
    with pytest.raises(StorageFailed, match=os.strerror(number)) as caught:
        load_model(section(gguf_file))
    assert (caught.value.where, caught.value.exit_status) == (str(tmp_path / "cache"), 1)
    assert "TUNESMITH_CACHE" in caught.value.mend


def test_another_gguf_file_of_the_same_name_is_converted_anew(gguf_file, tmp_path):
    first = load_model(section(gguf_file))
    write_gguf(gguf_file, model_folder(tmp_path / "other", seed=1))
    second = load_model(section(gguf_file))
    assert second.identity.folder != first.identity.folder
    assert second.identity.sha256 != first.identity.sha256


def test_a_file_that_is_no_gguf_is_a_model_error_and_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError):
        load_model(section(tmp_path / "broken.gguf"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_embedded_model_has_its_public_name_and_its_package_is_never_imported(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.move(gguf_file, package / "tiny.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(load.EMBEDDED, "tiny-embedded", Embedded("tiny_package", "tiny.gguf", "acme/Tiny", "pip install tiny-package"))
    loaded = load_model(section("tiny-embedded"))
    assert loaded.identity.name == "acme/Tiny"
    assert "tiny_package" not in sys.modules


def test_an_embedded_model_whose_package_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(load.EMBEDDED, "tiny-embedded", Embedded("no_such_package", "tiny.gguf", "acme/Tiny", "pip install tiny-package"))
    with pytest.raises(ModelError, match="pip install tiny-package"):
        load_model(section("tiny-embedded"))


def serve(folder: Path) -> ThreadingHTTPServer:
    """A stand-in for the hub that holds acme/tiny at one commit."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def log_message(self, *_):
            pass

        def answer(self):
            path, status, body, headers = self.path.split("?")[0], 404, b"", {"X-Error-Code": "EntryNotFound"}
            if path.startswith("/api/models/acme/tiny"):
                names = [{"rfilename": file.name} for file in folder.iterdir()]
                status, body = 200, json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": names, "tags": []}).encode()
                headers = {"Content-Type": "application/json"}
                if "/tree/" in path:
                    entries = [
                        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in folder.iterdir()
                    ]
                    body = json.dumps(entries).encode()
            elif path.startswith("/acme/tiny/resolve/") and (folder / path.rsplit("/", 1)[1]).is_file():
                body = (folder / path.rsplit("/", 1)[1]).read_bytes()
                status, headers = 200, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            elif not path.startswith("/acme/tiny/"):
                headers = {"X-Error-Code": "RepoNotFound"}
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


SCRIPT = """
import json, sys
from tunesmith.models.load import load_model
from tunesmith.recipe import ModelSection
loaded = load_model(ModelSection(name="acme/tiny", dtype="float32"))
print(json.dumps({**loaded.identity.public(), "weight": loaded.model.model.norm.weight.sum().item()}))
"""


def test_a_hub_name_is_loaded_from_the_endpoint_at_a_commit_that_is_recorded(sound, tmp_path):
    server = serve(sound)
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    local = load_model(section(sound))
    assert (told["name"], told["revision"], told["sha256"]) == ("acme/tiny", COMMIT, local.identity.sha256)
    assert told["weight"] == local.model.model.norm.weight.sum().item()
