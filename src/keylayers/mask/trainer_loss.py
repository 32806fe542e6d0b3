# SPDX-License-Identifier: Apache-2.0
"""The trainer's own loss on the trainer's own batches, whichever trainer it is.

Nothing here knows the objective: any `transformers.Trainer`, every TRL trainer and subclasses with
their own `compute_loss` work, because gates are the only trainable parameters while masks are
learned.
"""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from keylayers.errors import ConfigError, DataError, LossError


class TrainerLoss:
    """Batches and losses of a trainer, without its optimiser, schedule, checkpoints or log."""

    def __init__(self, trainer: Trainer) -> None:
        num_processes = trainer.accelerator.num_processes
        if num_processes > 1:
            raise ConfigError(
                f"masks must be learned in one process, got {num_processes}: their gradients are "
                f"not averaged over processes yet; start without a launcher"
            )
        self.trainer = trainer

    def batches(self) -> Iterator[Any]:
        """Training batches without end, shuffled anew in each epoch by the trainer's own sampler.

        Raises:
            DataError: the trainer has no training data.
        """
        if self.trainer.train_dataset is None:
            raise DataError(
                "the trainer must have a `train_dataset` to learn a mask on, but it has none"
            )
        loader = self.trainer.get_train_dataloader()
        epoch = 0
        while True:
            if hasattr(
                loader, "set_epoch"
            ):  # accelerate's loaders reshuffle by it, plain ones need not
                loader.set_epoch(epoch)
            num_batches = 0
            for batch in loader:
                num_batches += 1
                yield batch
            if num_batches == 0:
                raise DataError(
                    "the trainer's data must give at least one batch, but it gives none"
                )
            epoch += 1

    def loss(self, batch: Any) -> Tensor:
        """The loss on one batch, with its graph; mean over whatever the trainer averages over."""
        trainer = self.trainer
        trainer.model.train()
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(trainer.model, inputs)

    def backward(self, batch: Any, *, step: int) -> float:
        """Add the gradient of the loss on `batch` to the gates; the loss in nats.

        Raises:
            LossError: the loss is NaN or infinite; says at which step.
        """
        loss = self.loss(batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LossError(
                f"the loss must be finite, but it is {value} at mask step {step}; lower the "
                f"learning rate of stage 1 or load the model in float32"
            )
        loss.backward()  # not accelerator.backward, which divides by the accumulation steps
        return value

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Give the trainer back with the metrics and data loaders that it had."""
        trainer = self.trainer
        metrics = copy.deepcopy(getattr(trainer, "_metrics", None))  # TRL's running averages
        num_tokens = getattr(trainer, "_total_train_tokens", None)
        num_loaders = len(trainer.accelerator._dataloaders)
        try:
            yield
        finally:
            if metrics is not None:
                trainer._metrics = metrics
            if num_tokens is not None:
                trainer._total_train_tokens = num_tokens
            del trainer.accelerator._dataloaders[num_loaders:]


def mean_loss(source: TrainerLoss, batches: list[Any]) -> float:
    """Mean loss in nats over `batches`, weighted by labelled tokens (without labels, by rows).

    The model runs in evaluation mode and gets its mode back.
    """
    model = source.trainer.model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = weight_sum = 0.0
    try:
        for batch in batches:
            inputs = source.trainer._prepare_inputs(dict(batch))
            weight = _weight(inputs)
            with torch.no_grad(), source.trainer.compute_loss_context_manager():
                total += weight * float(source.trainer.compute_loss(model, inputs))
            weight_sum += weight
    finally:
        for module, mode in modes:
            module.training = mode
    return total / weight_sum


def _weight(inputs: dict[str, Any]) -> float:
    """How many labelled next tokens a batch holds; without labels, how many rows."""
    if "labels" in inputs:
        return max(1.0, float((inputs["labels"][..., 1:] != -100).sum()))
    return float(len(next(iter(inputs.values()))))
