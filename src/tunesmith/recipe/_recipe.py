"""The whole recipe: its sections, and what must hold between them."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import Field, model_validator

from ._base import Section
from .data import DataSection
from .evaluate import CANDIDATES, EvaluateSection
from .launch import ZERO, LaunchSection
from .method import WHOLE
from .model import ModelSection
from .rewards import ModelReward
from .stage import Stage
from .task import TaskSection
from .tracking import OutputSection, TrackingSection


class Recipe(Section):
    """One recipe, one command, one verdict."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """The run's name; its directory is runs/NAME."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the data order, the held-out split, new weights and the bootstrap."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """What an hour of this machine costs, in any currency: the plan says what the run will cost, the report what it did."""
    model: ModelSection
    """The base model."""
    task: TaskSection = TaskSection()
    """What a good answer is."""
    data: DataSection
    """The rows."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    """Training stages, in order."""
    evaluate: EvaluateSection = EvaluateSection()
    """What is compared, and the gates."""
    launch: LaunchSection = LaunchSection()
    """Several processes and machines."""
    tracking: TrackingSection = TrackingSection()
    """Trackers."""
    output: OutputSection = OutputSection()
    """Where the run lies."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            second = names.index(twice[0], names.index(twice[0]) + 1)
            raise ValueError(f"stages.{second}.name: stage names must differ; {', '.join(twice)} occurs twice")
        for i, name in enumerate(names):
            if name in (*CANDIDATES, "base"):
                raise ValueError(f"stages.{i}.name: {name} is the name of a candidate or of the base itself; call the stage something else")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        known = (*CANDIDATES, *names)
        wanted = [(f"evaluate.candidates.{i}", name) for i, name in enumerate(self.evaluate.candidates)]
        for i, gate in enumerate(self.evaluate.gates):
            named = {key: getattr(gate, key) for key in ("candidate", "better_than", "not_worse_than")}
            wanted += [(f"evaluate.gates.{i}.{key}", name) for key, name in named.items() if name]
        for where, name in wanted:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                instead = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"{where}: no candidate or stage is called {name}; {instead}")
        for i, stage in enumerate(self.stages):
            if stage.start_from in names[i:]:
                raise ValueError(f"stages.{i}.start_from: stage {stage.start_from} comes no earlier than {stage.name}; put it before")
        return self

    @model_validator(mode="after")
    def _reward_models_are_trained_before(self) -> Recipe:
        places = {stage.name: i for i, stage in enumerate(self.stages)}
        for i, stage in enumerate(self.stages):
            for key, name in _reward_models(stage):
                where = f"stages.{i}.objective.{key}"
                if places.get(name, -1) >= i:
                    raise ValueError(f"{where}: stage {name} comes no earlier than {stage.name}; put it before")
                if name in places and self.stages[places[name]].objective.type != "reward":
                    other = self.stages[places[name]].objective.type
                    raise ValueError(f"{where}: stage {name} is of objective {other} and scores nothing; name a stage of objective reward")
        return self

    @model_validator(mode="after")
    def _what_is_sharded_has_whole_numbers(self) -> Recipe:
        strategy = self.launch.strategy
        if self.model.quantization is not None and strategy != "ddp":
            raise ValueError(f"launch.strategy: {strategy} does not shard a quantised base; take ddp, or leave model.quantization out")
        if self.model.dtype == "float16" and strategy in ZERO:
            raise ValueError(f"launch.strategy: {strategy} does not scale the loss of float16; take bfloat16, or fsdp")
        return self

    @model_validator(mode="after")
    def _what_is_sharded_is_not_moved_whole(self) -> Recipe:
        strategy = self.launch.strategy
        methods: dict[str | None, str | None] = {}  # that of a result in a folder is known when it is read, and looked at then
        for i, stage in enumerate(self.stages):
            method = methods[stage.name] = stage.method.type if stage.method else methods.get(stage.start_from)
            if strategy == "fsdp" and method in WHOLE and stage.optim in ("adafactor", "muon"):
                raise ValueError(
                    f"stages.{i}.optim: {stage.optim} moves whole matrices, and fsdp shards those of a base that trains ({method}); "
                    "take adamw_torch_fused or adamw_8bit, or launch.strategy: ddp"
                )
            if strategy in ZERO and stage.optim != "adamw_torch_fused":
                raise ValueError(f"stages.{i}.optim: with {strategy} it is adamw_torch_fused, which DeepSpeed moves flat; or take fsdp")
        return self

    @model_validator(mode="after")
    def _choices_have_rows(self) -> Recipe:
        for i, stage in enumerate(self.stages):
            asked = "early_stopping_patience" if stage.early_stopping_patience else "load_best_model_at_end"
            if getattr(stage, asked) and (stage.data or self.data).validation == 0:
                raise ValueError(f"stages.{i}.{asked}: it needs validation rows, and data.validation is 0")
        return self


def _reward_models(stage: Stage) -> list[tuple[str, str]]:
    """The reward models that a stage names, with the key of each."""
    given = getattr(stage.objective, "reward_model", None)
    named = [("reward_model", given)] if isinstance(given, str) else [(f"reward_model.{i}", one) for i, one in enumerate(given or [])]
    rewards = enumerate(getattr(stage.objective, "rewards", []))
    return named + [(f"rewards.{i}.model", reward.model) for i, reward in rewards if isinstance(reward, ModelReward)]
