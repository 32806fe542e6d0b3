# SPDX-License-Identifier: Apache-2.0
"""Find the weight matrices that a fine-tune of a language model really needs, and train only those.

    ranking = keylayers.rank_modules(trainer)          # any transformers or TRL trainer with LoRA
    config = ranking.select(0.3).lora_config(r=16)     # an ordinary peft.LoraConfig

Public names load when they are first used, so that importing keylayers is cheap and runs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keylayers._version import __version__

if TYPE_CHECKING:
    from keylayers.apply.hub import push_to_hub
    from keylayers.commands.run_options import (
        CurveOptions,
        PruneOptions,
        RankOptions,
        TrainOptions,
        VerifyOptions,
    )
    from keylayers.commands.selection import BudgetOptions, SelectionOptions
    from keylayers.data.options import DataOptions
    from keylayers.errors import KeylayersError
    from keylayers.evaluation.mask_curve import mask_curve
    from keylayers.evaluation.options import (
        BenchmarkOptions,
        ComparedOptions,
        EvalOptions,
        EvalRunOptions,
        LossOptions,
    )
    from keylayers.evaluation.record import Evaluation
    from keylayers.export import export_selection
    from keylayers.model.options import ModelOptions, UpdateOptions
    from keylayers.ranking.budget import Freeze
    from keylayers.ranking.certainty import undecided
    from keylayers.ranking.compare import Agreement, agreement, chance_jaccard
    from keylayers.ranking.consensus import consensus
    from keylayers.ranking.curve import MaskCurve, Recommendation
    from keylayers.ranking.memory import StepMemory
    from keylayers.ranking.ranked_module import RankedModule
    from keylayers.ranking.ranking import Ranking
    from keylayers.ranking.selection import Selection
    from keylayers.ranking.verification import Verification
    from keylayers.runs.callback import FreezeUnimportant
    from keylayers.runs.eval import evaluate
    from keylayers.runs.prune import PrunedUpdate, prune
    from keylayers.runs.rank import rank
    from keylayers.runs.train import train
    from keylayers.runs.train_job import TrainedSet
    from keylayers.runs.verify import verify
    from keylayers.scores.methods import Method, register_method
    from keylayers.training.memory import measured_memory
    from keylayers.training.options import ObjectiveOptions, StabilityOptions, TrainingOptions
    from keylayers.training.prefix_cache import PrefixCache
    from keylayers.training.rank_modules import rank_modules
    from keylayers.training.shallow import ShallowBackward
    from keylayers.training.step_scores import StepScores
    from keylayers.updates.dense import module_weights

_HOME = {
    "Agreement": "ranking.compare",
    "BenchmarkOptions": "evaluation.options",
    "BudgetOptions": "commands.selection",
    "ComparedOptions": "evaluation.options",
    "CurveOptions": "commands.run_options",
    "DataOptions": "data.options",
    "EvalOptions": "evaluation.options",
    "EvalRunOptions": "evaluation.options",
    "Evaluation": "evaluation.record",
    "Freeze": "ranking.budget",
    "FreezeUnimportant": "runs.callback",
    "KeylayersError": "errors",
    "LossOptions": "evaluation.options",
    "MaskCurve": "ranking.curve",
    "Method": "scores.methods",
    "ModelOptions": "model.options",
    "ObjectiveOptions": "training.options",
    "PrefixCache": "training.prefix_cache",
    "PruneOptions": "commands.run_options",
    "PrunedUpdate": "runs.prune",
    "RankOptions": "commands.run_options",
    "RankedModule": "ranking.ranked_module",
    "Ranking": "ranking.ranking",
    "Recommendation": "ranking.curve",
    "Selection": "ranking.selection",
    "SelectionOptions": "commands.selection",
    "ShallowBackward": "training.shallow",
    "StabilityOptions": "training.options",
    "StepMemory": "ranking.memory",
    "StepScores": "training.step_scores",
    "TrainOptions": "commands.run_options",
    "TrainedSet": "runs.train_job",
    "TrainingOptions": "training.options",
    "UpdateOptions": "model.options",
    "Verification": "ranking.verification",
    "VerifyOptions": "commands.run_options",
    "agreement": "ranking.compare",
    "chance_jaccard": "ranking.compare",
    "consensus": "ranking.consensus",
    "evaluate": "runs.eval",
    "export_selection": "export",
    "mask_curve": "evaluation.mask_curve",
    "measured_memory": "training.memory",
    "module_weights": "updates.dense",
    "prune": "runs.prune",
    "push_to_hub": "apply.hub",
    "rank": "runs.rank",
    "rank_modules": "training.rank_modules",
    "register_method": "scores.methods",
    "train": "runs.train",
    "undecided": "ranking.certainty",
    "verify": "runs.verify",
}

__all__ = [
    "Agreement",
    "BenchmarkOptions",
    "BudgetOptions",
    "ComparedOptions",
    "CurveOptions",
    "DataOptions",
    "EvalOptions",
    "EvalRunOptions",
    "Evaluation",
    "Freeze",
    "FreezeUnimportant",
    "KeylayersError",
    "LossOptions",
    "MaskCurve",
    "Method",
    "ModelOptions",
    "ObjectiveOptions",
    "PrefixCache",
    "PruneOptions",
    "PrunedUpdate",
    "RankOptions",
    "RankedModule",
    "Ranking",
    "Recommendation",
    "Selection",
    "SelectionOptions",
    "ShallowBackward",
    "StabilityOptions",
    "StepMemory",
    "StepScores",
    "TrainOptions",
    "TrainedSet",
    "TrainingOptions",
    "UpdateOptions",
    "Verification",
    "VerifyOptions",
    "__version__",
    "agreement",
    "chance_jaccard",
    "consensus",
    "evaluate",
    "export_selection",
    "mask_curve",
    "measured_memory",
    "module_weights",
    "prune",
    "push_to_hub",
    "rank",
    "rank_modules",
    "register_method",
    "train",
    "undecided",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keylayers' has no attribute {name!r}")
    return getattr(import_module(f"keylayers.{_HOME[name]}"), name)
