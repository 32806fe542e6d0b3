# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes of one session, each on a fresh model: stage 1 trains all modules, others a set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from keylayers.apply.trainable import prove_trainable, train_only
from keylayers.commands.session import Session, loss_of
from keylayers.files import json_sha256
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.sharding import check_can_freeze_inside
from keylayers.model.weights import adapter_sha256, weights_sha256
from keylayers.ranking.record import TrainedSet
from keylayers.trainers.loss import finite
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.options import FreezeAction, StabilityOptions, TrainingOptions
from keylayers.training.run import TrainingResult, fine_tune, new_adapter
from keylayers.training.step_scores import StepScores

Tuned: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class FineTuned:
    """A trained set with its model."""

    rows: tuple[TrainedSet, ...]  # of the base model, if it was measured, and of the set
    model: Tuned
    result: TrainingResult


@dataclass(frozen=True)
class FineTuning:
    """How sets of modules are trained, each with checkpoints in a folder of its own."""

    session: Session
    options: TrainingOptions
    num_steps: int  # at most
    unfinished: Path  # holds the folders of checkpoints

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which a full fine-tune is saved: the base model's own."""
        return Checkpoint.open(self.session.source).dtype()

    def inputs_sha256(self, names: Sequence[str], callback: FreezeUnimportant | None = None) -> str:
        """A hash of everything that decides the result of training `names`."""
        return inputs_sha256(
            self.session,
            self.options,
            num_steps=self.num_steps,
            modules=list(names),
            freeze=None if callback is None else callback.decisive(),
        )

    def trainer(self, names: Sequence[str], title: str) -> Trainer:
        """A trainer of exactly the modules `names` of a fresh model; loggers call it `title`."""
        model: Tuned = self.session.fresh()
        if self.options.is_full:
            train_only(model, names)
        else:
            model = new_adapter(model, names, self.options, num_steps=self.num_steps)
        trainer = self.session.trainer(model, self.options, self.num_steps, title)
        prove_trainable(model, names)
        return trainer

    def train_all(self, stability: StabilityOptions, inputs: str) -> tuple[Tuned, dict[str, Any]]:
        """Stage 1: train all modules until the loss is stable; the model and the record of it."""
        trainer = self.trainer(self.session.names, "stage-1")
        model = trainer.model
        scores = StepScores()
        if isinstance(model, PeftModel):
            trainer.add_callback(scores)
        title = "stage 1, training all modules"
        result = self._fine_tune(trainer, "stage-1", inputs, title, stability)
        reason = "the loss is stable" if result.stopped_by == "stable" else "the cap is reached"
        for score in scores.scores.values():
            finite(score, "the end of stage 1")
        self.session.progress.note(f"stage 1 ended after {result.num_steps} steps: {reason}")
        return model, {
            "losses": list(result.losses),
            "num_steps": result.num_steps,
            "num_trained_parameters": _num_trained(model),
            "stopped_by": result.stopped_by,
            "learning_rate": trainer.args.learning_rate,
            "seconds": result.seconds,
            "step_scores": dict(scores.scores),
        } | (
            {"adapter_sha256": adapter_sha256(model)}
            if isinstance(model, PeftModel)
            else {"weights_sha256": weights_sha256(model)}
        )

    def train(
        self,
        names: Sequence[str],
        label: str,
        callback: FreezeUnimportant | None = None,
        measure_base: bool = False,
    ) -> FineTuned:
        """Fine-tune exactly `names`, or the part of them that `callback` leaves trainable."""
        trainer = self.trainer(names, label.replace(" ", "-"))
        model = trainer.model
        if callback is not None:
            check_can_freeze_inside(trainer)  # before the base model is measured
            callback.mask_dataset = trainer.eval_dataset.get("mask")
        # A LoRA update is zero at first, so this is the loss of the base model.
        base = [_row(trainer, "base model", (), 0)] if measure_base else []
        if callback is not None:
            trainer.add_callback(callback)
        inputs = self.inputs_sha256(names, callback)
        result = self._fine_tune(trainer, label, inputs, f"training {label}")
        if callback is not None and callback.frozen_at_step is not None:
            assert callback.selection is not None
            names = callback.selection.names
            label = frozen_label(label, callback.action, callback.frozen_at_step)
        prove_trainable(model, names)
        if self.options.is_full:
            _round(model, self.stored_dtype)
        rows = (*base, _row(trainer, label, names, result.num_steps))
        return FineTuned(rows, model, result)

    def _fine_tune(
        self,
        trainer: Trainer,
        label: str,
        inputs: str,
        title: str,
        stability: StabilityOptions | None = None,
    ) -> TrainingResult:
        progress = self.session.progress
        checkpoints = Checkpoints(self.unfinished / label, inputs, self.options.save_steps)
        if checkpoints.last is not None:
            progress.note(f"{title}: continues after step {checkpoints.last_step}")
        with progress.stage(title, self.num_steps) as on_step:
            return fine_tune(trainer, stability, on_step, checkpoints=checkpoints)


def frozen_label(label: str, action: FreezeAction, step: int) -> str:
    """The label of a set whose other modules were trained only up to a step."""
    done = {"freeze": "frozen", "remove": "removed"}[action]
    return f"{label} (others {done} at step {step})"


def inputs_sha256(session: Session, options: TrainingOptions, **more: Any) -> str:
    """A hash of everything that decides the result of a training, `more` included."""
    inputs = {
        "environment": session.record["environment"],
        "model": session.record["model"],
        "split": session.record["data"]["split_sha256"],
        "training": options.decisive(),
    }
    return json_sha256(inputs | more)


def _row(trainer: Trainer, label: str, names: Sequence[str], num_steps: int) -> TrainedSet:
    """What is recorded of a model in which `names` were trained."""
    return TrainedSet(
        label=label,
        num_modules=len(names),
        num_trained_parameters=_num_trained(trainer.model) if names else 0,
        held_out_loss_nats=loss_of(trainer),
        num_steps=num_steps,
    )


@torch.no_grad()
def _round(model: Tuned, dtype: torch.dtype) -> None:
    """Round all weights to the dtype that they will be stored in; their dtype stays."""
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))


def _num_trained(model: Tuned) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
