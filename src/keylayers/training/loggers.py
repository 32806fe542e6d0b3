# SPDX-License-Identifier: Apache-2.0
"""The loggers that follow a training: those of transformers, by name."""

import os
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback

from keylayers.errors import ConfigError, did_you_mean


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
    """Let TensorBoard write to a folder of this training, where a user finds it.

    By default it writes to the trainer's output folder, which is a temporary one here.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(_folder() / title)


@cache
def _folder() -> Path:
    """The folder that all trainings of a process share."""
    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return Path(given).expanduser() if given else Path("runs", time.strftime("%Y-%m-%d_%H-%M-%S"))
