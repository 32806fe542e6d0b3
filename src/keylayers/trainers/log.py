# SPDX-License-Identifier: Apache-2.0
"""The trainer's own loggers (`report_to`), such as TensorBoard: losses, scores and gates.

Only the logger callbacks of transformers are called, because other callbacks would take a mask step
for a training step. Curves start at mask step 1, even after training: `mask_loss`, and for each
gate `mask_score/NAME` and `mask_gate/NAME`.
"""

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from keylayers.errors import ConfigError, did_you_mean
from keylayers.progress import OnStep

LOGGERS = tuple(INTEGRATION_TO_CALLBACK.values())


def check_loggers(names: Sequence[str]) -> None:
    """Raise a ConfigError for a logger that transformers does not know or that is not installed."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"`report_to` must be among {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, got "
                f"{name!r}{did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise ConfigError(
                f"`report_to` {name} must be installed, but is not: {error}"
            ) from error


def name_loggers(trainer: Trainer, title: str) -> None:
    """Let TensorBoard write to a folder of this training, not to the temporary output folder."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(_folder() / title)


@cache
def _folder() -> Path:
    """The folder that all trainings of a process share."""
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(given).expanduser() if given else Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S"))


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
