"""The recipe: the one typed, strict description of a run. No torch is imported here."""

from ._load import dump_recipe, json_schema, load_recipe
from ._recipe import Recipe
from .data import DataSection
from .evaluate import EvaluateSection, Gate
from .launch import ZERO, LaunchSection, Strategy
from .method import (
    WHOLE,
    BottleneckMethod,
    FullMethod,
    Ia3Method,
    LoraMethod,
    Method,
    PartialMethod,
    PrefixMethod,
    PromptMethod,
    PTuningMethod,
    virtual_tokens_of,
)
from .model import ModelSection, RopeScaling
from .objective import (
    BestOfNObjective,
    CPOObjective,
    DPOObjective,
    GRPOObjective,
    KTOObjective,
    Objective,
    OnlineDPOObjective,
    ORPOObjective,
    PPOObjective,
    RankingObjective,
    RewardObjective,
    RLOOObjective,
    SFTObjective,
    SimPOObjective,
)
from .rewards import (
    ExactAnswerReward,
    JSONSchemaReward,
    ModelReward,
    PythonReward,
    RegexReward,
    Reward,
    UnitTestReward,
)
from .rollout import RolloutSection, WatchSection
from .stage import COMPARING, Stage
from .task import TaskSection
from .tracking import OutputSection, TrackingSection

__all__ = [
    "COMPARING",
    "WHOLE",
    "ZERO",
    "BottleneckMethod",
    "Ia3Method",
    "PTuningMethod",
    "PartialMethod",
    "PrefixMethod",
    "PromptMethod",
    "BestOfNObjective",
    "CPOObjective",
    "DPOObjective",
    "GRPOObjective",
    "KTOObjective",
    "OnlineDPOObjective",
    "ORPOObjective",
    "PPOObjective",
    "RankingObjective",
    "RewardObjective",
    "RLOOObjective",
    "SimPOObjective",
    "ExactAnswerReward",
    "JSONSchemaReward",
    "ModelReward",
    "PythonReward",
    "RegexReward",
    "Reward",
    "UnitTestReward",
    "RolloutSection",
    "WatchSection",
    "DataSection",
    "EvaluateSection",
    "FullMethod",
    "Gate",
    "LaunchSection",
    "LoraMethod",
    "Method",
    "ModelSection",
    "RopeScaling",
    "Objective",
    "OutputSection",
    "Recipe",
    "SFTObjective",
    "Stage",
    "Strategy",
    "TaskSection",
    "TrackingSection",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "virtual_tokens_of",
]
