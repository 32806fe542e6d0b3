# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes of sets of modules: each on a fresh model, all in the same way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from keylayers.apply.adapter import prove_trainable
from keylayers.apply.freeze import round_to_stored, train_only
from keylayers.apply.halt import prove_kept
from keylayers.data.prepare import PreparedData
from keylayers.evaluation.loss import held_out_loss
from keylayers.files import json_sha256
from keylayers.model.sharding import check_can_freeze_inside
from keylayers.progress import Progress
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.objectives import LoadReference, prepared_examples
from keylayers.training.options import TrainingOptions
from keylayers.training.run import TrainingResult, fine_tune, make_trainer, new_adapter


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
    ) -> tuple[PreTrainedModel | PeftModel, Trainer]:
        """A trainer of exactly `names`, and the model that it trains.

        Args:
            model: A base model that nothing else uses.
            names: Full module names.
            title: What loggers call the run.
            evaluates: Whether the held-out examples are prepared too.
        """
        tuned: PreTrainedModel | PeftModel = model
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
    model: PreTrainedModel | PeftModel
    result: TrainingResult
    base_loss_nats: float


@dataclass(frozen=True)
class SetTrainer:
    """Trains sets of modules, and goes on where an earlier run was stopped.

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
        """Fine-tune exactly `names`, or those that `callback` leaves trainable.

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
        # LoRA's update is zero at first, so this is the loss of the base model.
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
        row = TrainedSet(
            label=label,
            num_modules=len(names),
            num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            held_out_loss_nats=held_out_loss(trainer, examples["held_out"]),
            num_steps=result.num_steps,
        )
        return Trained(row, model, result, base_loss)

    def _fine_tune(self, trainer: Trainer, label: str, inputs: str) -> TrainingResult:
        progress, options = self.fine_tuning.progress, self.fine_tuning.options
        checkpoints = Checkpoints(self.unfinished / label, inputs, options.save_steps)
        if checkpoints.last is not None:
            progress.note(f"training of {label} goes on after step {checkpoints.last_step}")
        with progress.stage(f"training: {label}", self.fine_tuning.num_steps) as on_step:
            return fine_tune(trainer, None, on_step, checkpoints=checkpoints)
