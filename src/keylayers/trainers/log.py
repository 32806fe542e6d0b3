# SPDX-License-Identifier: Apache-2.0
"""Report scores and gates to the trainer's own loggers (`report_to`), such as TensorBoard.

Only the logger callbacks of transformers are called, because other callbacks would take a mask step
for a training step. Curves start at mask step 1, even after training: `mask_loss`, and for each
gate `mask_score/NAME` and `mask_gate/NAME`.
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
    """Passes losses, scores and gates to the loggers of a trainer, and losses to `on_step`."""

    def __init__(self, trainer: Trainer, on_step: OnStep | None = None) -> None:
        self._trainer = trainer
        self._on_step = on_step
        callbacks = trainer.callback_handler.callbacks
        self._loggers = [callback for callback in callbacks if isinstance(callback, LOGGERS)]
        self._is_ready = False

    def loss(self, step: int, loss: float) -> None:
        """Log the loss of a pass, and call `on_step`."""
        self._tell(step, {"mask_loss": loss})
        if self._on_step is not None:
            self._on_step(step, loss)

    def gates(self, step: int, names: Mapping[str, object], scores: Float[Tensor, " gate"]) -> None:
        """Log the score of each gate after a step, and the gate's value."""
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
        """Log final scores once, for methods that do not learn them step by step."""
        self._tell(step, {f"mask_score/{name}": value for name, value in scores.items()})

    def _tell(self, step: int, logs: Mapping[str, float]) -> None:
        trainer = self._trainer
        state, control = copy.copy(trainer.state), copy.copy(trainer.control)
        for logger in self._loggers:
            # transformers' loggers are set up by `on_train_begin`, which only `train` calls.
            if not self._is_ready and trainer.state.global_step == 0:
                logger.on_train_begin(trainer.args, state, control, model=trainer.model)
            state.global_step = step
            logger.on_log(trainer.args, state, control, model=trainer.model, logs=dict(logs))
        self._is_ready = True
