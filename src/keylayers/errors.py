# SPDX-License-Identifier: Apache-2.0
"""The exceptions that keylayers raises.

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
from collections.abc import Iterable


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
