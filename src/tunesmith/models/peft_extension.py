"""PEFT learns the type BOTTLENECK (bottleneck.py) as soon as it is imported beside tunesmith, in whichever order.

Then `PeftConfig.from_pretrained`, `PeftModel.from_pretrained` and `get_peft_model` know our adapters. PEFT is not imported for it, and
where it lacks what this needs it is left as it is. Imports neither torch nor PEFT itself.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Sequence
from enum import EnumType
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

BOTTLENECK = "BOTTLENECK"


def extend_when_imported() -> None:
    """Makes the type known now, where PEFT is imported already, else right after it is."""
    if "peft" in sys.modules:
        _extend()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def _extend() -> None:
    try:
        import_module(f"{__package__}.bottleneck")
    except Exception as error:  # whatever is wrong with us, PEFT must import
        warnings.warn(f"PEFT will not know tunesmith's bottleneck adapters: {error}", stacklevel=2)


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as the others do, and extends it once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            plain = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                plain(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                _extend()

            spec.loader.exec_module = exec_module
        return spec


def register(config: type, model: type) -> str | None:
    """Adds the type to PEFT by its own `register_peft_method`. Gives the reason where this PEFT cannot take it, and leaves it as it was."""
    import peft

    register, types = getattr(peft.utils, "register_peft_method", None), getattr(peft, "PeftType", None)
    method = {"name": BOTTLENECK.lower(), "config_cls": config, "model_cls": model}
    if register is None or not isinstance(types, EnumType):
        return f"PEFT {peft.__version__} lets no other package register a method"
    if BOTTLENECK in types.__members__:
        return f"PEFT {peft.__version__} has a method of the same name"
    _add_member(types, BOTTLENECK)
    try:
        inspect.signature(register).bind(**method)
        register(**method)
    except (TypeError, ValueError, LookupError, AttributeError, ImportError) as error:
        _remove_member(types, BOTTLENECK)
        return f"PEFT {peft.__version__} registers methods in another way ({error})"
    return None


def _add_member(enum: EnumType, name: str) -> None:
    """One more member of a string enumeration, whose value is its name."""
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    setattr(enum, name, member)
    enum._member_map_[name] = enum._value2member_map_[name] = member
    enum._member_names_.append(name)


def _remove_member(enum: EnumType, name: str) -> None:
    enum._member_names_.remove(name)
    del enum._member_map_[name], enum._value2member_map_[name]
    delattr(enum, name)
