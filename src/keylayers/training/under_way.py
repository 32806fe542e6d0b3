# SPDX-License-Identifier: Apache-2.0
"""A training that is under way, seen from a callback: its trainer, and the loss of each step.

Callbacks are told neither. They are called by the trainer's own methods, though, so the trainer is
on the call stack while an event is handled: that finds it whichever library or subclass it comes
from, and needs nothing from the user. Loss logs are means over `logging_steps`, and their windows
shift when a run resumes; what `training_step` gives, the method that transformers documents for
subclasses to change, is the loss of each batch itself.
"""

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from keylayers.errors import ConfigError
from keylayers.processes import summed


def trainer_of(callback: TrainerCallback) -> Trainer:
    """The trainer that is calling `callback` just now.

    Raises:
        ConfigError: no trainer that holds the callback is on the call stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise ConfigError(
        f"{type(callback).__name__} must be called by the trainer that holds it, but none is on "
        f"the call stack; give it as `trainer`"
    )


class StepLosses:
    """Sees the loss of each batch that a trainer trains on, until closed."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._had_own = "training_step" in vars(trainer)
        self._training_step = trainer.training_step
        self._batches: list[Tensor] = []
        trainer.training_step = self._seen

    def _seen(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = self._training_step(*arguments, **options)
        self._batches.append(loss.detach())
        return loss

    def take(self) -> float:
        """The loss in nats of the step that just ended: trainers give each batch its share.

        Of several processes, the mean: trainers scale their shares for that.
        """
        loss = torch.tensor(float(sum(self._batches)), dtype=torch.float64)
        self._batches.clear()
        return float(summed(loss)) / self._trainer.accelerator.num_processes

    def close(self) -> None:
        """Give the trainer its method back, unless somebody else has put another over it."""
        if vars(self._trainer).get("training_step") != self._seen:
            return
        if self._had_own:
            self._trainer.training_step = self._training_step
        else:
            del self._trainer.training_step


@contextlib.contextmanager
def loaders_kept(trainer: Trainer) -> Iterator[None]:
    """Leave accelerate with the data loaders that it was reading; others may be left half read."""
    gradient_state = trainer.accelerator.gradient_state
    loaders = gradient_state.dataloader_references
    try:
        yield
    finally:
        gradient_state.dataloader_references = loaders
