"""`import tunesmith` teaches PEFT bottleneck adapters, in either order and without importing it; another PEFT is left as it is."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
import types

import peft
import pytest
import torch
from tests.cli_tools import environment
from tests.fresh import in_new_process
from tests.toys import model_folder

from tunesmith.errors import AdapterError, ModelError
from tunesmith.models import peft_extension
from tunesmith.models.bottleneck import REFUSED, BottleneckConfig, BottleneckModel
from tunesmith.models.load import load_model
from tunesmith.models.methods import attach, bottleneck, load_adapter, save_result, saving
from tunesmith.recipe import BottleneckMethod, ModelSection
from tunesmith.rundir import atomic_folder

IDS = [[1, 2, 3, 4, 5]]
ORDERS = {
    "tunesmith first": "import tunesmith\nfrom peft import PeftModel",
    "peft first": "from peft import PeftModel\nimport tunesmith",
    "peft looked for, then imported by ours": (
        "import tunesmith, importlib.util\nimportlib.util.find_spec('peft')\nimport tunesmith.models.bottleneck\nfrom peft import PeftModel"
    ),
}
LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    print(model(torch.tensor({ids})).logits.double().flatten()[::7].tolist())
print("finders", sum(type(finder).__module__.startswith("tunesmith") for finder in sys.meta_path))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(base's folder, adapter's folder, the tuned model's logits)."""
    folder = tmp_path_factory.mktemp("saved")
    base = load_model(ModelSection(name=str(model_folder(folder / "base")), dtype="float32"))
    model = attach(base, BottleneckMethod(architecture="parallel", bottleneck_size=4), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.2)
    with atomic_folder(folder / "adapter") as temporary:
        save_result(model, base, temporary, {})
    base.model.set_attn_implementation("eager")
    with torch.no_grad():
        return folder / "base", folder / "adapter", model.eval()(torch.tensor(IDS)).logits.double().flatten()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_peft_loads_our_adapter_in_a_new_process_to_equal_logits(saved, order):
    base, adapter, logits = saved
    done = in_new_process(order + LOADS.format(ids=IDS), base, adapter)
    assert done.returncode == 0, done.stderr
    numbers, finders = done.stdout.splitlines()
    assert torch.equal(torch.tensor(json.loads(numbers), dtype=torch.float64), logits[::7])
    assert finders == "finders 0"


def test_without_tunesmith_peft_says_that_it_does_not_know_the_type(saved):
    base, adapter, _ = saved
    done = in_new_process("from peft import PeftModel" + LOADS.format(ids=IDS), base, adapter)
    assert done.returncode != 0
    assert "KeyError: 'BOTTLENECK'" in done.stderr


def test_import_tunesmith_imports_neither_torch_nor_peft():
    code = "import sys, tunesmith\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "peft", "pydantic"} & set(done.stdout.split())


def test_the_installed_peft_has_the_type():
    assert REFUSED is None
    assert peft.PeftType("BOTTLENECK") is peft.PeftType.BOTTLENECK
    assert peft.get_peft_config({"peft_type": "BOTTLENECK", "bottleneck_size": 3}) == BottleneckConfig(bottleneck_size=3)


def stand_in(monkeypatch, register):
    """A PEFT without our type, and with another way to register one. Gives its types."""

    class PeftType(str, enum.Enum):  # noqa: UP042 (as PEFT's is)
        LORA = "LORA"

    monkeypatch.setattr(peft, "PeftType", PeftType)
    monkeypatch.setattr(peft, "utils", types.SimpleNamespace(register_peft_method=register))
    return PeftType


def refuse(*, name, config_cls, model_cls):
    raise KeyError("no more methods")


OTHERS = {
    "no way to register": None,
    "other parameters": lambda *, name, config, model: None,
    "more parameters": lambda *, name, config_cls, model_cls, license: None,
    "a refusal": refuse,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_peft_is_left_as_it_is_and_the_reason_given(monkeypatch, other):
    kinds = stand_in(monkeypatch, other)
    assert "PEFT 0." in peft_extension.register(BottleneckConfig, BottleneckModel)
    assert list(kinds) == ["LORA"]
    assert not hasattr(kinds, "BOTTLENECK")
    with pytest.raises(ValueError, match="BOTTLENECK"):
        kinds("BOTTLENECK")


def test_a_peft_that_can_take_it_gets_it_once(monkeypatch):
    kinds = stand_in(monkeypatch, lambda *, name, config_cls, model_cls: None)
    assert peft_extension.register(BottleneckConfig, BottleneckModel) is None
    assert list(kinds) == ["LORA", "BOTTLENECK"]
    assert kinds("BOTTLENECK") is kinds.BOTTLENECK == "BOTTLENECK"
    assert "method of the same name" in peft_extension.register(BottleneckConfig, BottleneckModel)


def test_where_peft_was_left_as_it_is_training_and_loading_say_why(monkeypatch, saved):
    reason = "PEFT 9 lets no other package register a method"
    for module in (saving, bottleneck):
        monkeypatch.setattr(module, "REFUSED", reason)
    base = load_model(ModelSection(name=str(saved[0]), dtype="float32"))
    with pytest.raises(AdapterError, match=reason):
        load_adapter(base, saved[1])
    with pytest.raises(ModelError, match=reason):
        attach(base, BottleneckMethod(), seed=0)
