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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from keylayers.errors import ConfigError, DataError, LossError
from keylayers.updates.adalora import without_penalty


class TrainerLoss:
    """Batches and losses of a trainer, without its optimiser, schedule, checkpoints or log.

    Attributes:
        model: Whose loss it is: the trainer's own unless another is given.
        num_forward: Forward passes over a batch so far.
        num_backward: Backward passes over a batch so far.
    """

    def __init__(self, trainer: Trainer, model: nn.Module | None = None) -> None:
        num_processes = trainer.accelerator.num_processes
        if num_processes > 1:
            raise ConfigError(
                f"masks must be learned in one process, got {num_processes}: their gradients are "
                f"not averaged over processes yet; start without a launcher"
            )
        self.trainer = trainer
        self.model = trainer.model if model is None else model
        self.num_forward = 0
        self.num_backward = 0

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
        self.model.train()
        inputs = trainer._prepare_inputs(dict(batch))  # TRL takes columns out of what it is given
        self.num_forward += 1
        with trainer.compute_loss_context_manager(), without_penalty(self.model):
            return trainer.compute_loss(self.model, inputs)

    def backward(self, batch: Any, *, step: int) -> float:
        """Add the gradient of the loss on `batch` to the gates; the loss in nats.

        Raises:
            LossError: the loss is NaN or infinite; says at which step.
        """
        loss = self.loss(batch)
        value = _finite(loss, step)
        self.num_backward += 1
        loss.backward()  # not accelerator.backward, which divides by the accumulation steps
        return value

    def value(self, batch: Any, *, step: int) -> float:
        """The loss on `batch` in nats, without a graph.

        Raises:
            LossError: the loss is NaN or infinite; says at which step.
        """
        with torch.no_grad():
            return _finite(self.loss(batch), step)

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


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LossError(
            f"the loss must be finite, but it is {value} at mask step {step}; lower the "
            f"learning rate of stage 1 or load the model in float32"
        )
    return value


@dataclass(frozen=True)
class BatchLosses:
    """Losses of several batches.

    Attributes:
        losses: Mean loss of each batch in nats.
        weights: Labelled tokens of each batch; without labels, its rows.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Weighted mean in nats: over all labelled tokens of all batches."""
        products = (loss * weight for loss, weight in zip(self.losses, self.weights, strict=True))
        return sum(products) / sum(self.weights)


def batch_losses(source: TrainerLoss, batches: list[Any]) -> BatchLosses:
    """Loss in nats of each batch; the model runs in evaluation mode and gets its mode back."""
    model = source.model
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    losses, weights = [], []
    try:
        for batch in batches:
            inputs = source.trainer._prepare_inputs(dict(batch))
            weights.append(_weight(inputs))
            with (
                torch.no_grad(),
                source.trainer.compute_loss_context_manager(),
                without_penalty(model),
            ):
                losses.append(float(source.trainer.compute_loss(model, inputs)))
    finally:
        for module, mode in modes:
            module.training = mode
    return BatchLosses(tuple(losses), tuple(weights))


def _weight(inputs: dict[str, Any]) -> float:
    """How many labelled next tokens a batch holds; without labels, how many rows."""
    if "labels" in inputs:
        return max(1.0, float((inputs["labels"][..., 1:] != -100).sum()))
    return float(len(next(iter(inputs.values()))))
