# SPDX-License-Identifier: Apache-2.0
"""The trainer's loss on batches that it does not train on, with the model in evaluation mode."""

from dataclasses import dataclass
from typing import Any

import torch

from keylayers.errors import ConfigError
from keylayers.model.preserve import to_evaluation
from keylayers.trainers.batches import num_labels, own_copy, samples
from keylayers.trainers.loss import TrainerLoss, finite
from keylayers.updates.adalora import without_penalty


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
    """Loss in nats of each batch; afterwards the model is in its own mode again.

    Raises:
        ConfigError: the trainer samples its own data, so its loss is meaningless.
        LossError: a loss is NaN or infinite; says in which batch.
    """
    model, trainer = source.model, source.trainer
    if samples(trainer):
        raise ConfigError(
            f"a held-out loss must be a function of the data, but {type(trainer).__name__} samples "
            f"completions and its loss is near zero whatever the model; compare mean rewards"
        )
    modes = [(module, module.training) for module in model.modules()]
    to_evaluation(model)
    losses, weights = [], []
    try:
        for number, batch in enumerate(batches, start=1):
            inputs = trainer._prepare_inputs(own_copy(batch))
            weights.append(num_labels(inputs))
            with (
                torch.no_grad(),
                trainer.compute_loss_context_manager(),
                without_penalty(model),
            ):
                loss = float(trainer.compute_loss(model, inputs))
                losses.append(finite(loss, f"batch {number}"))
    finally:
        for module, mode in modes:
            module.training = mode
    return BatchLosses(tuple(losses), tuple(weights))
