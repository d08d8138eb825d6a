"""`export`: a run's result as a folder for other tools, whole or absent.

merged: the adapter's weights added to the base's, in fp32, saved in the run's dtype, read back, and compared with the live model on the
run's own rows; where the two differ nothing is written. A whole model is copied or, for another dtype, cast and compared so.
adapter: the result's own folder, without what only tunesmith reads again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..data.template import load_template
from ..errors import AdapterError, MissingFile, OutputInUse, RecipeError
from ..models.heads import HEADS
from ..models.load import LoadedModel, load_model, quiet
from ..models.methods import ADAPTERS
from ..models.methods.tokens import fold_new_tokens
from ..models.opening import open_result
from ..models.result import ADAPTER_CONFIG, CARD, is_adapter, is_model, read_adapter_config, read_card, require_unaltered
from ..recipe import ModelSection, Recipe, load_recipe
from ..report.card import base_notes, export_card
from ..rundir import MANIFEST, atomic_folder, sole_writer
from ..train.stage import add_new_tokens
from ._hub import push_folder, require_token
from ._parity import Parity, compared_rows, hidden_states, measure, require_equal

Target = Literal["merged", "adapter"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Exported:
    """What was written. parity: None where the weights are the result's own, byte for byte."""

    path: Path
    parity: Parity | None
    pushed: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """What is exported, and where to. result: its folder; stage: None for the run's last; name: by which others will load it."""

    run: Path
    recipe: Recipe
    result: Path
    stage: str | None
    target: Path
    name: str
    trust_remote_code: bool


def export(
    run: str | Path,
    to: Target | str = "merged",
    *,
    out: str | Path | None = None,
    stage: str | None = None,
    dtype: str | None = None,
    push: str | None = None,
    public: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    report: Report = lambda event: None,
) -> Exported:
    """Writes a run's result for other tools; `push` names a repository of the hub (HF_ENDPOINT, HF_TOKEN) that gets it too.

    run: the run directory. out: the folder; else RUN/export/TO. stage: an earlier stage's result in place of the last. dtype: of merged
    weights or a whole model's; else the run's. public: whether a repository that is made for it can be read by all. force: replace an
    export that is there.

    Raises OutputInUse where an export is there, unless force; RecipeError where the method cannot be merged, with the reason, or where
    `dtype` is none or is asked of an adapter; AdapterError where the written model is not the live one, with nothing written;
    CheckpointError where the result is not what was saved; StorageFailed.

    >>> tunesmith.export("runs/quickstart").path  # doctest: +SKIP
    PosixPath('runs/quickstart/export/merged')
    """
    if to not in get_args(Target):
        raise RecipeError(f"nothing is exported to `{to}`", where="--to", mend=f"one of: {', '.join(get_args(Target))}")
    if to == "adapter" and dtype is not None:
        raise RecipeError("an adapter leaves in the dtype that it was trained in", where="--dtype", mend="leave it out, or use --to merged")
    path = Path(run)
    recipe, folder = _recipe_of(path), _result_of(path, stage)
    require_unaltered(folder)
    if push is not None:
        require_token()
    target = Path(out) if out is not None else path / "export" / to
    chosen = _dtype(dtype, recipe)
    merges = to == "merged" and is_adapter(folder)
    if merges:
        _require_mergeable(folder, recipe)
    job = _Job(path, recipe, folder, stage, target, push or target.name, trust_remote_code)
    with sole_writer(target.parent) if out is None else nullcontext():  # beside a folder of the user's nothing is swept
        _require_free(target, force)
        made = _merge(job, chosen, report) if merges or (to == "merged" and chosen != _dtype(None, recipe)) else _copy(job, to)
    if push is None:
        return made
    report({"event": "exporting", "what": f"push to {push}"})
    return Exported(made.path, made.parity, push_folder(target, push, private=not public), made.notes)


def _recipe_of(path: Path) -> Recipe:
    if not (path / "recipe.yaml").is_file():
        raise MissingFile("no recipe.yaml: this is no run directory", where=str(path), mend="name a folder such as runs/quickstart")
    return load_recipe(path / "recipe.yaml")


def _result_of(path: Path, stage: str | None) -> Path:
    folder = path / "model" if stage is None else path / "stages" / stage / "model"
    if not is_model(folder):
        stages = sorted(found.parent.name for found in path.glob("stages/*/model") if is_model(found))
        mend = (
            f"stages with a result: {', '.join(stages)}"
            if stages
            else "train it first: tunesmith run RECIPE, with --resume if it was broken off"
        )
        raise MissingFile("there is no result", where=str(folder), mend=mend)
    return folder


def _require_free(target: Path, force: bool) -> None:
    """A folder that is there may be replaced if it is empty or, by force, an export of ours."""
    if target.is_dir() and any(target.iterdir()):
        if "export" not in read_card(target):
            raise RecipeError("the folder holds something else", where=str(target), mend="choose another with --out")
        if not force:
            raise OutputInUse(
                "an export is there already", where=str(target), mend="choose another folder with --out, or add --force to replace it"
            )
    if target.exists() and not target.is_dir():
        raise RecipeError("a file of that name is there", where=str(target), mend="choose another with --out")


def _require_mergeable(folder: Path, recipe: Recipe) -> None:
    kind = ADAPTERS[read_adapter_config(folder)["peft_type"]]
    if kind.mergeable is not None:
        raise RecipeError(
            f"this adapter cannot be merged: {kind.mergeable}",
            where=str(folder),
            mend="use --to adapter, and load it with tunesmith.load",
        )
    if recipe.model.quantization is not None:
        raise RecipeError(
            f"the base is quantised ({recipe.model.quantization}), and weights of a few bits cannot hold what was learned",
            where=str(folder),
            mend="use --to adapter: it is loaded on the quantised base that it was trained on",
        )


def _dtype(given: str | None, recipe: Recipe) -> torch.dtype:
    name = given or recipe.model.dtype
    if name not in DTYPES:
        raise RecipeError(f"no dtype is called {name}", where="--dtype", mend=f"one of: {', '.join(DTYPES)}")
    return DTYPES[name]


def _copy(job: _Job, to: str) -> Exported:
    """The result's own files; of a whole model also where it was asked to be merged, since there is nothing to add."""
    folder = job.result
    notes = [] if to == "adapter" or is_adapter(folder) else ["the result is a whole model already: its weights are copied"]
    if to == "adapter" and not is_adapter(folder):
        raise RecipeError("the result is a whole model, and no adapter", where=str(folder), mend="use --to merged: it is copied")
    if is_adapter(folder):
        kind = ADAPTERS[read_adapter_config(folder)["peft_type"]]
        if kind.peft_type == "BOTTLENECK":
            notes.append("PEFT loads an adapter of this type only after `import tunesmith`; tunesmith.load does all")
    card = read_card(folder)
    with atomic_folder(job.target) as temporary:
        for file in sorted(folder.iterdir()):
            if file.name not in (MANIFEST, CARD, "README.md"):
                shutil.copyfile(file, temporary / file.name)
        if is_adapter(folder):
            _name_the_base(job.run, temporary, card)
            notes += base_notes(job.recipe.model.model_dump(), card["base"], read_adapter_config(folder))
        _write_cards(job, temporary, {"to": to, "parity": None}, notes)
    return Exported(job.target, None, None, tuple(notes))


def _name_the_base(run: Path, folder: Path, card: dict[str, Any]) -> None:
    """The base by its public name: where it lies on this machine is nobody's business, and of no use elsewhere.

    Raises RecipeError where it has none, since another stage of the run made it.
    """
    if card["base"]["sha256"] != json.loads((run / MANIFEST).read_text())["model"]["sha256"]:
        raise RecipeError(
            "the adapter stands on the whole model of another stage, which nobody else has",
            where=str(run),
            mend="use --to merged, or export that stage too and tell people of both",
        )
    config = read_adapter_config(folder) | {"base_model_name_or_path": card["base"]["name"]}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _merge(job: _Job, dtype: torch.dtype, report: Report) -> Exported:
    """Merged weights; of a whole model its own, cast."""
    folder = job.result
    rows = compared_rows(job.run, job.stage, job.recipe)
    report({"event": "exporting", "what": "merge" if is_adapter(folder) else "cast"})
    loaded, live = _live(job.recipe, folder, job.trust_remote_code)
    before = hidden_states(live, rows)
    head = live.get_base_model().get_output_embeddings() if hasattr(live, "get_base_model") else live.get_output_embeddings()
    before.keep_head(head)
    if is_adapter(folder):
        fold_new_tokens(live)
        live = live.merge_and_unload(safe_merge=True)
    merged = live.to(dtype)
    merged.config.dtype = dtype
    with atomic_folder(job.target) as temporary:
        with quiet():
            merged.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        if (folder / HEADS).is_file():
            shutil.copyfile(folder / HEADS, temporary / HEADS)
        del merged, live
        report({"event": "exporting", "what": "compare"})
        again = load_model(ModelSection(name=str(temporary), dtype="float32", trust_remote_code=job.trust_remote_code)).model
        parity = measure(before, again, rows)
        require_equal(parity, folder)
        about = {"to": "merged", "dtype": str(dtype).removeprefix("torch."), "parity": asdict(parity)}
        _write_cards(job, temporary, about, [])
    return Exported(job.target, parity, None)


def _live(recipe: Recipe, folder: Path, trust_remote_code: bool) -> tuple[LoadedModel, nn.Module]:
    """The whole model, or the adapter on its base as it is held in use, computed in fp32: what written weights are held against."""
    if not is_adapter(folder):
        section = ModelSection(name=str(folder.resolve()), dtype="float32", trust_remote_code=trust_remote_code)
        loaded = load_model(section)
        return loaded, loaded.model
    loaded = load_model(recipe.model.model_copy(update={"trust_remote_code": trust_remote_code}))
    loaded.model, loaded.dtype = loaded.model.float(), torch.float32
    template = load_template(loaded.tokenizer, recipe.model) if _has_template(loaded, recipe) else None
    add_new_tokens(loaded, template)
    model = open_result(folder, loaded, trust_remote_code=trust_remote_code)
    if not hasattr(model, "merge_and_unload"):
        raise AdapterError("nothing can be merged", where=str(folder), mend="use --to adapter")
    return loaded, model


def _has_template(loaded: LoadedModel, recipe: Recipe) -> bool:
    return bool(loaded.tokenizer.chat_template) or recipe.model.chat_template is not None


def _write_cards(job: _Job, folder: Path, about: dict[str, Any], notes: list[str]) -> None:
    """tunesmith.json with the origin and the certificate, and README.md, into the folder that is being made."""
    card = read_card(job.result)
    (folder / CARD).write_text(json.dumps({**card, "export": about}, indent=2, sort_keys=True))
    text = export_card(job.run, job.recipe.model_dump(), card, stage=job.stage, about=about, notes=notes, name=job.name, folder=folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
