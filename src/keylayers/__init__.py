# SPDX-License-Identifier: Apache-2.0
"""Find the weight matrices that a fine-tune of a language model really needs, and train only those.

    ranking = keylayers.rank_modules(trainer)          # any transformers or TRL trainer with LoRA
    config = ranking.select(0.3).lora_config(r=16)     # an ordinary peft.LoraConfig

Public names load when they are first used, so that importing keylayers is cheap and runs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keylayers._version import __version__ as __version__

if TYPE_CHECKING:  # `as` marks the names as public, for type checkers
    from keylayers.errors import KeylayersError as KeylayersError
    from keylayers.evaluation.held_out import mask_curve as mask_curve
    from keylayers.evaluation.verify import verify_ranking as verify_ranking
    from keylayers.export import export_selection as export_selection
    from keylayers.ranking.compare import agreement as agreement
    from keylayers.ranking.consensus import consensus as consensus
    from keylayers.ranking.ranking import Ranking as Ranking
    from keylayers.ranking.selection import Selection as Selection
    from keylayers.ranking.verification import Verification as Verification
    from keylayers.report.notebook import curve_chart as curve_chart
    from keylayers.report.notebook import ranking_chart as ranking_chart
    from keylayers.report.notebook import ranking_table as ranking_table
    from keylayers.scores.methods import Method as Method
    from keylayers.scores.methods import register_method as register_method
    from keylayers.training.freeze import FreezeUnimportant as FreezeUnimportant
    from keylayers.training.memory import measured_memory as measured_memory
    from keylayers.training.rank_modules import rank_modules as rank_modules
    from keylayers.training.shallow import ShallowBackward as ShallowBackward
    from keylayers.training.step_scores import StepScores as StepScores
    from keylayers.updates.checkpoints import module_weights as module_weights

_HOME = {
    "FreezeUnimportant": "training.freeze",
    "KeylayersError": "errors",
    "Method": "scores.methods",
    "Ranking": "ranking.ranking",
    "Selection": "ranking.selection",
    "ShallowBackward": "training.shallow",
    "StepScores": "training.step_scores",
    "Verification": "ranking.verification",
    "agreement": "ranking.compare",
    "consensus": "ranking.consensus",
    "curve_chart": "report.notebook",
    "export_selection": "export",
    "mask_curve": "evaluation.held_out",
    "measured_memory": "training.memory",
    "module_weights": "updates.checkpoints",
    "rank_modules": "training.rank_modules",
    "ranking_chart": "report.notebook",
    "ranking_table": "report.notebook",
    "register_method": "scores.methods",
    "verify_ranking": "evaluation.verify",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'keylayers' has no attribute {name!r}")
    return getattr(import_module(f"keylayers.{_HOME[name]}"), name)
