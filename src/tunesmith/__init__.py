"""tunesmith: fine-tune a language model and prove what the tuning did. Names are loaded when first used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .models.peft_extension import extend_when_imported

if TYPE_CHECKING:
    from .chat import Chat
    from .data.inspect import propose_recipe
    from .errors import TunesmithError
    from .export import Exported, export
    from .inspection import check_data_file, init
    from .models.opening import load
    from .pipeline import RunResult, evaluate, plan, run, train
    from .recipe import Recipe, json_schema, load_recipe
    from .report import write_report
    from .sweep import SweepResult, sweep

_HOME = {
    "Chat": "chat",
    "Recipe": "recipe",
    "RunResult": "pipeline",
    "TunesmithError": "errors",
    "check_data_file": "inspection",
    "evaluate": "pipeline",
    "Exported": "export",
    "export": "export",
    "init": "inspection",
    "json_schema": "recipe",
    "load": "models.opening",
    "load_recipe": "recipe",
    "plan": "pipeline",
    "propose_recipe": "data.inspect",
    "run": "pipeline",
    "SweepResult": "sweep",
    "sweep": "sweep",
    "train": "pipeline",
    "write_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"tunesmith has no {name}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


class _Package(ModuleType):
    """`train`, `evaluate`, `export` and `sweep` are verbs here, also once the subpackages of the same names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
extend_when_imported()
