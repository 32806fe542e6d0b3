# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes of sets of modules, each on a fresh model: stage 1 trains all, others a selection."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from keylayers.apply.adapter import prove_trainable
from keylayers.apply.freeze import round_to_stored, train_only
from keylayers.apply.halt import prove_kept
from keylayers.data.prepare import PreparedData
from keylayers.errors import RankingError
from keylayers.evaluation.loss import held_out_loss
from keylayers.files import RECORD, json_sha256
from keylayers.model.sharding import check_can_freeze_inside
from keylayers.model.weights import adapter_sha256, weights_sha256
from keylayers.progress import Progress
from keylayers.ranking.record import read_run
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.objectives import LoadReference, prepared_examples
from keylayers.training.options import StabilityOptions, TrainingOptions
from keylayers.training.run import TrainingResult, fine_tune, make_trainer, new_adapter
from keylayers.training.step_scores import StepScores

Tuned: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class FineTuning:
    """What all fine-tunes of one run share.

    Attributes:
        options: How to train, and for which objective.
        num_steps: Optimiser steps, at most.
        tokenizer: The model's own.
        data: Training and held-out examples.
        load: Loads the base model again, as the reference of dpo and kto.
        progress: Where to report to.
    """

    options: TrainingOptions
    num_steps: int
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    load: LoadReference
    progress: Progress

    def trainer(
        self, model: PreTrainedModel, names: Sequence[str], title: str, *, evaluates: bool = True
    ) -> tuple[Tuned, Trainer]:
        """The model that is trained, and a trainer of exactly `names`.

        Args:
            model: A base model that nothing else uses.
            names: Full module names.
            title: What loggers call the run.
            evaluates: Whether the held-out examples are prepared too.
        """
        tuned: Tuned = model
        if self.options.is_full:
            train_only(model, names)
        else:
            tuned = new_adapter(model, names, self.options, num_steps=self.num_steps)
        trainer = make_trainer(
            tuned,
            self.tokenizer,
            self.data.train,
            self.options,
            num_steps=self.num_steps,
            evaluation=self.data.evaluation() if evaluates else None,
            max_length=self.data.max_length,
            load_reference=self.load,
            title=title,
        )
        prove_trainable(tuned, names)
        return tuned, trainer


def train_all(
    fine_tuning: FineTuning,
    model: PreTrainedModel,
    names: Sequence[str],
    stability: StabilityOptions,
    checkpoints: Checkpoints,
) -> tuple[Tuned, dict[str, Any]]:
    """Stage 1: train all modules until the loss is stable or the cap is reached.

    Args:
        fine_tuning: Its `num_steps` is the cap.
        model: The base model.
        names: All modules.
        stability: When the loss counts as stable.
        checkpoints: Where to resume from and to save.

    Returns:
        The tuned model, and the record of stage 1.
    """
    progress = fine_tuning.progress
    tuned, trainer = fine_tuning.trainer(model, names, "stage-1", evaluates=False)
    scores = StepScores()
    if isinstance(tuned, PeftModel):
        trainer.add_callback(scores)
    if checkpoints.last is not None:
        progress.note(f"stage 1 continues after step {checkpoints.last_step}")
    with progress.stage("stage 1: fine-tuning all modules", fine_tuning.num_steps) as on_step:
        result = fine_tune(trainer, stability, on_step, checkpoints=checkpoints)
    reason = "the loss is stable" if result.stopped_by == "stable" else "the cap is reached"
    progress.note(f"stage 1 ended after {result.num_steps} steps: {reason}")
    return tuned, {
        "losses": list(result.losses),
        "num_steps": result.num_steps,
        "num_trained_parameters": _num_trained(tuned),
        "stopped_by": result.stopped_by,
        "learning_rate": trainer.args.learning_rate,
        "seconds": result.seconds,
        "step_scores": dict(scores.scores),
    } | (
        {"adapter_sha256": adapter_sha256(tuned)}
        if isinstance(tuned, PeftModel)
        else {"weights_sha256": weights_sha256(tuned)}
    )


def finished_stage_1(folder: Path, inputs_sha256: str) -> dict[str, Any] | None:
    """The record of a finished stage 1 in `folder`, if it had the same inputs."""
    try:
        record = read_run(folder / RECORD)
    except RankingError:
        return None
    return record.content.get("stage_1") if record.inputs_sha256 == inputs_sha256 else None


@dataclass(frozen=True)
class TrainedSet:
    """One set of modules and how well it trained.

    Attributes:
        label: What the set is.
        num_modules: Its modules; 0 for the base model.
        num_trained_parameters: Parameters that were trained.
        held_out_loss_nats: Mean loss of the held-out examples, in the record's `loss_unit`.
        num_steps: Optimiser steps; 0 for the base model.
    """

    label: str
    num_modules: int
    num_trained_parameters: int
    held_out_loss_nats: float
    num_steps: int


@dataclass(frozen=True)
class Trained:
    """A trained set with its model, and the held-out loss of the model before training."""

    row: TrainedSet
    model: Tuned
    result: TrainingResult
    base_loss_nats: float


@dataclass(frozen=True)
class SetTrainer:
    """Trains sets of modules, and resumes where an earlier run was stopped.

    Attributes:
        fine_tuning: What the fine-tunes share.
        fresh: Gives a base model that nothing else uses.
        stored_dtype: The dtype in which a full fine-tune is saved.
        unfinished: Folder for checkpoints, with a folder for each set.
        inputs: What decides the results apart from the options of the training.
    """

    fine_tuning: FineTuning
    fresh: Callable[[], PreTrainedModel]
    stored_dtype: torch.dtype
    unfinished: Path
    inputs: Mapping[str, Any]

    def inputs_sha256(self, names: Sequence[str], callback: FreezeUnimportant | None = None) -> str:
        """A hash of everything that decides the result of training `names`."""
        return json_sha256(
            {
                **self.inputs,
                "training": self.fine_tuning.options.decisive(),
                "num_steps": self.fine_tuning.num_steps,
                "modules": list(names),
                "freeze": None if callback is None else callback.decisive(),
            }
        )

    def train(
        self,
        names: Sequence[str],
        label: str,
        callback: FreezeUnimportant | None = None,
        measure_base: bool = False,
    ) -> Trained:
        """Fine-tune exactly `names`, or the part of them that `callback` leaves trainable.

        Args:
            names: Full module names.
            label: What the set is called.
            callback: Freezes modules inside the run.
            measure_base: Measure the base model first; its loss is NaN if not.
        """
        fresh = self.fresh()
        model, trainer = self.fine_tuning.trainer(fresh, names, label.replace(" ", "-"))
        examples = prepared_examples(trainer)
        if callback is not None:
            check_can_freeze_inside(trainer)  # before the base model is measured
            callback.mask_dataset = examples.get("mask")
        # A LoRA update is zero at first, so this is the loss of the base model.
        base_loss = held_out_loss(trainer, examples["held_out"]) if measure_base else float("nan")
        if callback is not None:
            trainer.add_callback(callback)
        result = self._fine_tune(trainer, label, self.inputs_sha256(names, callback))
        if callback is None or callback.selection is None:
            prove_trainable(model, names)
        else:
            names = callback.selection.names
            prove_kept(model, names)
        if self.fine_tuning.options.is_full:
            round_to_stored(fresh, self.stored_dtype)
        loss = held_out_loss(trainer, examples["held_out"])
        row = TrainedSet(label, len(names), _num_trained(model), loss, result.num_steps)
        return Trained(row, model, result, base_loss)

    def _fine_tune(self, trainer: Trainer, label: str, inputs: str) -> TrainingResult:
        progress, options = self.fine_tuning.progress, self.fine_tuning.options
        checkpoints = Checkpoints(self.unfinished / label, inputs, options.save_steps)
        if checkpoints.last is not None:
            progress.note(f"training of {label} continues after step {checkpoints.last_step}")
        with progress.stage(f"training: {label}", self.fine_tuning.num_steps) as on_step:
            return fine_tune(trainer, None, on_step, checkpoints=checkpoints)


def _num_trained(model: Tuned) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
