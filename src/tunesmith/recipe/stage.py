"""A stage: one training run from a start, towards an objective, by a method. Leaf names are Hugging Face's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ._base import PathText, Section, type_names
from .data import DataSection
from .method import Method
from .objective import Objective
from .rollout import RolloutSection, WatchSection

Positive = Annotated[int, Field(ge=1)]
COMPARING = {"dpo", "simpo", "orpo", "cpo", "kto", "ranking", "ppo", "grpo", "rloo", "online_dpo"}
"""Objectives that compare log-probabilities, which dropout would make noisy: adapters' own is off."""


def _or_its_name(section: Any) -> Any:
    """A section's type, or one of the names that stand for it with its defaults: what an editor may accept."""
    return section | Literal[*type_names(section)]


class Stage(Section):
    """One training stage."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """The stage's name, a folder under stages/."""
    objective: Objective
    """What is optimised; a bare name (sft) stands for its defaults."""
    method: Method | None = None
    """Which parameters train; derived from start_from, else LoRA."""
    start_from: PathText | None = None
    """An earlier stage, an earlier run's folder, or an adapter's folder; else the base."""
    data: DataSection | None = None
    """This stage's own data; else the recipe's."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """This stage's own seed; else the recipe's. Reward models of an ensemble differ by it."""
    rollout: RolloutSection = RolloutSection()
    """How answers are sampled, for objectives that learn from their own."""
    watch: WatchSection = WatchSection()
    """When such a stage is stopped."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; derived from the method, the model's width and the objective."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows; max_steps wins."""
    max_steps: Positive | None = None
    """Updates in all; derived from num_train_epochs."""
    per_device_train_batch_size: Positive | None = None
    """Rows of one forward pass on one device; derived as 8, or fewer with more accumulation where 8 do not fit."""
    gradient_accumulation_steps: Positive | None = None
    """Forward passes of one update, on each of `launch.processes`; derived as 1, or as many as keep the update's 8 rows."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the schedule after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Updates of linear warm-up; derived as a twentieth of all."""
    optim: Literal["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon"] = "adamw_torch_fused"
    """The update rule, over fp32 masters: AdamW; AdamW with moments in 8 bits, paged to the host on CUDA; Adafactor; Muon for the layers'
    matrices, with AdamW for the rest."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second-moment decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's denominator term."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradient norm above which gradients are scaled down; null switches it off."""
    gradient_checkpointing: bool | Literal["selective"] | None = None
    """Recompute activations in the backward pass: of every layer, for about a third more time, or (selective) of every second one; derived
    as false where that fits."""
    activation_offload: bool = False
    """Keep what the backward pass needs in the host's pinned memory; on CUDA alone. What it saves and costs is not measured."""
    eval_steps: Positive | None = None
    """Updates between evaluations on the validation rows; derived as once an epoch."""
    early_stopping_patience: Positive | None = None
    """Evaluations without a better validation loss after which training stops."""
    load_best_model_at_end: bool = False
    """Whether the stage's result is the checkpoint with the lowest validation loss in place of the last."""
    save_steps: Positive | None = None
    """Updates between checkpoints; derived as once an epoch."""
    save_total_limit: Positive = 2
    """Checkpoints kept, besides the best."""
    logging_steps: Positive = 1
    """Updates between lines in the event log."""

    @model_validator(mode="after")
    def _reference_is_the_start(self) -> Stage:
        named = getattr(self.objective, "reference", "start")
        if named not in ("start", "none", self.start_from):
            start = self.start_from or "the base"
            raise ValueError(
                f"objective.reference: {named} is not what the stage starts from ({start}); write start, or start_from: {named}"
            )
        return self

    @model_validator(mode="after")
    def _dropout_is_asked_for_where_it_is_on(self) -> Stage:
        dropout = getattr(self.method, "lora_dropout", 0.0)
        if dropout and self.objective.type in COMPARING and self.start_from is None:  # else it may say what the start's adapter has
            raise ValueError(
                f"method.lora_dropout: {self.objective.type} compares log-probabilities, without dropout; leave lora_dropout out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_left_to_offload(self) -> Stage:
        if self.activation_offload and self.gradient_checkpointing is True:
            raise ValueError("activation_offload: with gradient_checkpointing: true the layers keep nothing to move; leave one of them out")
        return self

    @model_validator(mode="after")
    def _optim_reads_its_settings(self) -> Stage:
        if self.optim == "adafactor":
            for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}: optim: adafactor has no such number; leave {name} out")
        return self

    @model_validator(mode="after")
    def _sampling_is_asked_for_where_it_happens(self) -> Stage:
        samples = hasattr(self.objective, "num_generations")
        if not samples:
            for name, default in (("rollout", RolloutSection()), ("watch", WatchSection())):
                if getattr(self, name) != default:
                    raise ValueError(f"{name}: {self.objective.type} samples no answers; leave {name} out")
            return self
        if self.gradient_accumulation_steps not in (None, 1):
            raise ValueError("gradient_accumulation_steps: an update takes all its rollouts, in as many passes as it needs; leave it out")
        parts = getattr(self.objective, "num_mini_batches", 1)
        answers = self.rollout.prompts_per_step * getattr(self.objective, "num_generations", 1)
        if parts > answers:
            raise ValueError(f"objective.num_mini_batches: {answers} answers cannot be cut into {parts} parts; lower it")
        if self.rollout.server_model and not self.rollout.server:
            raise ValueError("rollout.server_model: there is no rollout.server that serves it")
        truncates = self.rollout.top_p < 1 or self.rollout.top_k > 0
        uses_kl = self.objective.type in ("ppo", "rloo") or getattr(self.objective, "kl_coef", 0) > 0 or self.watch.max_kl is not None
        if truncates and uses_kl:
            raise ValueError(
                "rollout.top_p, rollout.top_k: truncated answers have no KL that can be measured, and it is used here; leave them out"
            )
        return self

    @field_validator("objective", mode="before", json_schema_input_type=_or_its_name(Objective))
    @classmethod
    def _bare_objective(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("method", mode="before", json_schema_input_type=_or_its_name(Method) | None)
    @classmethod
    def _bare_method(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value
