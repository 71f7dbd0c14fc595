"""Split a transformer over GPUs inside its layers, with nothing in its code changed.

tp_model = autoshard.parallelize(model, tp=8)
"""

from autoshard.adafactor import Adafactor
from autoshard.api import parallelize, plan
from autoshard.checkpoints import async_save, load, save
from autoshard.data_parallel import average_gradients, fully_shard
from autoshard.errors import (
    AutoshardError,
    CaptureError,
    CheckpointError,
    CollectiveError,
    NonFiniteError,
    PlanError,
    RanksDifferError,
    UnknownOperatorError,
    UnsoundGraphError,
)
from autoshard.module import ParallelModule
from autoshard.plans import Plan, Region
from autoshard.rules import register_rule
from autoshard.verification import Report, verify
from autoshard.weights import meta_parameters

__version__ = "0.1.0"

__all__ = [
    "Adafactor",
    "AutoshardError",
    "CaptureError",
    "CheckpointError",
    "CollectiveError",
    "NonFiniteError",
    "ParallelModule",
    "Plan",
    "PlanError",
    "RanksDifferError",
    "Region",
    "Report",
    "UnknownOperatorError",
    "UnsoundGraphError",
    "async_save",
    "average_gradients",
    "fully_shard",
    "load",
    "meta_parameters",
    "parallelize",
    "plan",
    "register_rule",
    "save",
    "verify",
]
