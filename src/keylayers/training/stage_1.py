# SPDX-License-Identifier: Apache-2.0
"""Stage 1: an ordinary fine-tune of all modules, whose update is then ranked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.files import RECORD
from keylayers.model.weights import adapter_sha256, weights_sha256
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.options import StabilityOptions
from keylayers.training.run import fine_tune
from keylayers.training.step_scores import StepScores
from keylayers.training.trained_set import FineTuning


def train_all(
    fine_tuning: FineTuning,
    model: PreTrainedModel,
    names: Sequence[str],
    stability: StabilityOptions,
    checkpoints: Checkpoints,
) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
    """Train all modules until the loss is stable or the cap is reached.

    Args:
        fine_tuning: Its `num_steps` is the cap.
        model: The base model.
        names: All modules.
        stability: When the loss counts as stable.
        checkpoints: Where to go on, and to save.

    Returns:
        The tuned model, and the record of stage 1.
    """
    progress = fine_tuning.progress
    tuned, trainer = fine_tuning.trainer(model, names, "stage-1", evaluates=False)
    scores = StepScores()
    if isinstance(tuned, PeftModel):
        trainer.add_callback(scores)
    if checkpoints.last is not None:
        progress.note(f"stage 1 goes on after step {checkpoints.last_step}")
    with progress.stage("stage 1: fine-tuning all modules", fine_tuning.num_steps) as on_step:
        result = fine_tune(trainer, stability, on_step, checkpoints=checkpoints)
    reason = "the loss is stable" if result.stopped_by == "stable" else "the cap is reached"
    progress.note(f"stage 1 ended after {result.num_steps} steps: {reason}")
    return tuned, {
        "losses": list(result.losses),
        "num_steps": result.num_steps,
        "num_trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "stopped_by": result.stopped_by,
        "learning_rate": trainer.args.learning_rate,
        "seconds": result.seconds,
        "step_scores": dict(scores.scores),
        **_tuned_sha256(tuned),
    }


def finished_stage_1(folder: Path, inputs_sha256: str) -> dict[str, Any] | None:
    """The record of a finished stage 1 in `folder`, if it had the same inputs."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_same = isinstance(record, dict) and record.get("inputs_sha256") == inputs_sha256
    return record["stage_1"] if is_same else None


def _tuned_sha256(tuned: PreTrainedModel | PeftModel) -> dict[str, str]:
    """The hash that identifies this fine-tune: of the adapter, or of all weights."""
    if isinstance(tuned, PeftModel):
        return {"adapter_sha256": adapter_sha256(tuned)}
    return {"weights_sha256": weights_sha256(tuned)}
