# SPDX-License-Identifier: Apache-2.0
"""Report scores and gates to the trainer's own loggers (`report_to`), such as TensorBoard.

Only the logger callbacks of transformers are called, because other callbacks would take a mask step
for a training step. Curves start at mask step 1, even after training: `mask_loss`, and for each
gate `mask_score/NAME` and `mask_gate/NAME`.
"""

import copy
from collections.abc import Iterable, Mapping

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
        self._state, self._control = copy.copy(trainer.state), copy.copy(trainer.control)
        callbacks = trainer.callback_handler.callbacks
        self._loggers = [callback for callback in callbacks if isinstance(callback, LOGGERS)]
        if trainer.state.global_step == 0:  # loggers that `train` has not set up yet
            for logger in self._loggers:
                logger.on_train_begin(trainer.args, self._state, self._control, model=trainer.model)

    def loss(self, step: int, loss: float) -> None:
        """Log the loss of a pass, and call `on_step`."""
        self._tell(step, {"mask_loss": loss})
        if self._on_step is not None:
            self._on_step(step, loss)

    def gates(self, step: int, names: Iterable[str], scores: Float[Tensor, " gate"]) -> None:
        """Log the score of each gate after a step, and the gate's value."""
        logs: dict[str, float] = {}
        gates = torch.sigmoid(scores).tolist()
        for name, score, gate in zip(names, scores.tolist(), gates, strict=True):
            logs |= {f"mask_score/{name}": score, f"mask_gate/{name}": gate}
        self._tell(step, logs)

    def modules(self, step: int, scores: Mapping[str, float]) -> None:
        """Log final scores once, for methods that do not learn them step by step."""
        self._tell(step, {f"mask_score/{name}": value for name, value in scores.items()})

    def _tell(self, step: int, logs: Mapping[str, float]) -> None:
        args, model = self._trainer.args, self._trainer.model
        self._state.global_step = step
        for logger in self._loggers:
            logger.on_log(args, self._state, self._control, model=model, logs=dict(logs))
