# SPDX-License-Identifier: Apache-2.0
"""Scores and gates in the trainer's own loggers, those of `report_to`: TensorBoard and the like.

Only loggers of transformers hear of it; other callbacks would take a mask step for one of training.
Curves start at step 1 of the mask, whatever training has counted to: `mask_loss`, and for each gate
`mask_score/NAME` and `mask_gate/NAME`.
"""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from keylayers.progress import OnStep

LOGGERS = tuple(INTEGRATION_TO_CALLBACK.values())


class TrainerLog:
    """What the loggers of a trainer are told while its modules are scored."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._loggers = [
            one for one in trainer.callback_handler.callbacks if isinstance(one, LOGGERS)
        ]
        self._is_ready = False

    def losses(self, on_step: OnStep | None) -> OnStep | None:
        """`on_step` that also tells the loggers the loss of each pass."""
        if not self._loggers:
            return on_step

        def tell(step: int, loss: float | None) -> None:
            if loss is not None:
                self._tell(step, {"mask_loss": loss})
            if on_step is not None:
                on_step(step, loss)

        return tell

    def gates(self, step: int, names: Mapping[str, object], scores: Float[Tensor, " gate"]) -> None:
        """The score of each gate after a step, and how far that opens it."""
        if not self._loggers:
            return
        values = dict(zip(names, scores.tolist(), strict=True))
        opened = dict(zip(names, torch.sigmoid(scores).tolist(), strict=True))
        self._tell(
            step,
            {f"mask_score/{name}": value for name, value in values.items()}
            | {f"mask_gate/{name}": value for name, value in opened.items()},
        )

    def modules(self, step: int, scores: Mapping[str, float]) -> None:
        """The scores of a method that learns none by steps, once, at its last pass."""
        if self._loggers:
            self._tell(step, {f"mask_score/{name}": value for name, value in scores.items()})

    def _tell(self, step: int, logs: Mapping[str, float]) -> None:
        trainer = self._trainer
        state, control = copy.copy(trainer.state), copy.copy(trainer.control)
        for one in self._loggers:
            if not self._is_ready and trainer.state.global_step == 0:  # no training has begun it
                one.on_train_begin(trainer.args, state, control, model=trainer.model)
            state.global_step = step
            one.on_log(trainer.args, state, control, model=trainer.model, logs=dict(logs))
        self._is_ready = True
