# SPDX-License-Identifier: Apache-2.0
"""The trainer's own loss on the trainer's own batches, whichever trainer it is.

Nothing here knows the objective: any `transformers.Trainer`, every TRL trainer and subclasses with
their own `compute_loss` work, because gates are the only trainable parameters while masks are
learned.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from keylayers.errors import ConfigError, DataError, LossError
from keylayers.mask.reference import without_own_copy
from keylayers.mask.trainer_state import num_repeats, unchanged


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

        A trainer that keeps its data in order gets whole batches in another order: KTO pairs each
        prompt with an answer of its neighbour in the batch.

        Raises:
            DataError: the trainer has no training data.
        """
        if self.trainer.train_dataset is None:
            raise DataError(
                "the trainer must have a `train_dataset` to learn a mask on, but it has none"
            )
        loader = self._loader()
        epoch = 0
        while True:
            if hasattr(
                loader, "set_epoch"
            ):  # accelerate's loaders reshuffle by it, plain ones need not
                loader.set_epoch(epoch)
            num_batches = 0
            for batch in islice(loader, 0, None, num_repeats(self.trainer)):
                num_batches += 1
                yield batch
            if num_batches == 0:
                raise DataError(
                    "the trainer's data must give at least one batch, but it gives none"
                )
            epoch += 1
            loader = self._loader() if self._is_in_order() else loader

    def prepared(self, batch: Any) -> Any:
        """What the trainer makes of a batch before it computes the loss: on the device, sampled."""
        # TRL takes columns out of what it is given
        own = dict(batch) if isinstance(batch, Mapping) else [dict(row) for row in batch]
        return self.trainer._prepare_inputs(own)

    def loss(self, batch: Any) -> Tensor:
        """The loss on one batch, with its graph; mean over whatever the trainer averages over."""
        self.model.train()
        inputs = self.prepared(batch)
        self.num_forward += 1
        with self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(self.model, inputs)

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

    def look(self, batch: Any, *, step: int) -> float:
        """The loss on `batch` in nats, for those who watch what flows through the model.

        No graph is kept, and yet a pass that the loss is not differentiated through (of a
        reference, of sampling) is known by `torch.is_grad_enabled()`, which is False there alone.

        Raises:
            LossError: the loss is NaN or infinite; says at which step.
        """
        trained = [one for one in self.model.parameters() if one.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad():
                return _finite(self.loss(batch), step)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Give the trainer back as it was; inside, its reference is not the update itself."""
        with unchanged(self.trainer), without_own_copy(self.trainer):
            yield

    def _loader(self) -> DataLoader[Any]:
        trainer, dataset = self.trainer, self.trainer.train_dataset
        if self._is_in_order():
            trainer.train_dataset = _in_other_blocks(dataset, trainer._train_batch_size)
        try:
            return trainer.get_train_dataloader()
        finally:
            trainer.train_dataset = dataset

    def _is_in_order(self) -> bool:
        strategy = getattr(self.trainer.args, "train_sampling_strategy", "random")
        return strategy == "sequential" and isinstance(self.trainer.train_dataset, Dataset)


def _in_other_blocks(dataset: Dataset, size: int) -> Dataset:
    """The rows in blocks of `size` in random order, each block as it was; a shorter one last."""
    num_whole = len(dataset) // size
    order = [size * block + row for block in torch.randperm(num_whole) for row in range(size)]
    return dataset.select(
        [*(int(index) for index in order), *range(size * num_whole, len(dataset))]
    )


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
        weights: Labelled tokens of each batch where the loss is a mean over those; else its rows.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Weighted mean in nats: over all labelled tokens, or else all rows, of all batches."""
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
            inputs = source.prepared(batch)
            weights.append(_weight(inputs))
            with torch.no_grad(), source.trainer.compute_loss_context_manager():
                losses.append(float(source.trainer.compute_loss(model, inputs)))
    finally:
        for module, mode in modes:
            module.training = mode
    return BatchLosses(tuple(losses), tuple(weights))


def has_labelled_tokens(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch has a label for each token, so that its loss is a mean over tokens."""
    labels, tokens = inputs.get("labels"), inputs.get("input_ids")
    return (
        isinstance(labels, Tensor)
        and isinstance(tokens, Tensor)
        and labels.dim() == 2
        and labels.shape == tokens.shape
    )


def _weight(inputs: Mapping[str, Any]) -> float:
    """How many labelled next tokens a batch holds; without such labels, how many rows.

    A pair is two rows in some trainers and one in others, the same in all batches of one.
    """
    if has_labelled_tokens(inputs):
        return max(1.0, float((inputs["labels"][..., 1:] != -100).sum()))
    columns = [
        value
        for value in inputs.values()
        if isinstance(value, list) or (isinstance(value, Tensor) and value.dim() > 0)
    ]
    return float(len(columns[0])) if columns else 1.0
