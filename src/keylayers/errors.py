# SPDX-License-Identifier: Apache-2.0
"""The exceptions that keylayers raises, and checks of options.

KeylayersError                exit code
├── ConfigError (ValueError)      2     an option, a budget or a YAML file
├── DataError (ValueError)        2     a data set, its columns or its chat template
├── ModelError (ValueError)       2     a model, adapter or checkpoint that does not fit
├── RankingError (ValueError)     2     a ranking file, or a ranking of another model
├── OutputError (OSError)         2     a place that cannot be written
├── LossError (RuntimeError)      2     the loss became NaN or infinite
├── StudyError (RuntimeError)     1     cells of a study failed; the others are done
└── GuardError (RuntimeError)     1     a promise of keylayers itself was about to be broken

Every message says what must hold, what came and what to do, in one line.
"""

import difflib
import math
from collections.abc import Iterable

MAX_SEED = 2**32 - 1  # what NumPy's generators take


class KeylayersError(Exception):
    """Anything that keylayers refuses to do; `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(KeylayersError, ValueError):
    """An option has a value that cannot be used."""


class DataError(KeylayersError, ValueError):
    """A data set cannot be read, recognised or used for training."""


class ModelError(KeylayersError, ValueError):
    """A model, an adapter or a checkpoint is missing or does not fit."""


class RankingError(KeylayersError, ValueError):
    """A ranking file is damaged, or belongs to another model."""


class OutputError(KeylayersError, OSError):
    """The output cannot be written."""


class LossError(KeylayersError, RuntimeError):
    """The loss is not a finite number."""


class StudyError(KeylayersError, RuntimeError):
    """Some cells of a study failed."""

    exit_code = 1


class GuardError(KeylayersError, RuntimeError):
    """A check of keylayers on its own work failed: nothing was written that could mislead."""

    exit_code = 1


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near and near[0] != name else ""


def check_at_least(name: str, value: int, lowest: int) -> None:
    """Raise a ConfigError unless the option `name` is `lowest` or more."""
    if value < lowest:
        raise ConfigError(f"`{name}` must be at least {lowest}, got {value}")


def check_above_zero(name: str, value: float) -> None:
    """Raise a ConfigError unless the option `name` is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ConfigError(f"`{name}` must be above 0 and finite, got {value}")


def check_fraction(name: str, value: float) -> None:
    """Raise a ConfigError unless the option `name` is a share above 0 and below 1."""
    if not 0 < value < 1:
        raise ConfigError(f"`{name}` must be above 0 and below 1, got {value}")


def check_seed(name: str, value: int) -> None:
    """Raise a ConfigError unless the option `name` can seed every generator."""
    if not 0 <= value <= MAX_SEED:
        raise ConfigError(f"`{name}` must be from 0 to {MAX_SEED}, got {value}")
