# SPDX-License-Identifier: Apache-2.0
"""What a callback needs and is not told: its trainer, and the loss of each step.

The trainer's own methods call the callbacks, so it is on the call stack while it handles an event.
Logged losses are means over `logging_steps`, whose windows shift when a run resumes, so we read the
loss of each batch from `training_step`, which transformers documents for subclasses to override.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from keylayers.errors import ConfigError
from keylayers.processes import summed


def trainer_of(callback: TrainerCallback) -> Trainer:
    """The trainer that is calling `callback` right now."""
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
        self._replaced = vars(trainer).get("training_step")  # None: the class's own method
        self._training_step = trainer.training_step
        self._batches: list[Tensor] = []
        trainer.training_step = self._seen

    def _seen(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = self._training_step(*arguments, **options)
        self._batches.append(loss.detach())
        return loss

    def take(self) -> float:
        """The loss in nats of the step that just ended."""
        # Batches return shares of it, scaled so that their mean over processes is the step's loss.
        loss = torch.tensor(float(sum(self._batches)), dtype=torch.float64)
        self._batches.clear()
        return float(summed(loss)) / self._trainer.accelerator.num_processes

    def close(self) -> None:
        """Give the trainer its method back, unless someone else has replaced it since."""
        if vars(self._trainer).get("training_step") == self._seen:
            del self._trainer.training_step
            if self._replaced is not None:
                self._trainer.training_step = self._replaced
