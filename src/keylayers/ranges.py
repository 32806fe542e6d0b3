# SPDX-License-Identifier: Apache-2.0
"""Checks of an option's value, each with a one-line error."""

import math

from keylayers.errors import ConfigError

MAX_SEED = 2**32 - 1  # what NumPy's generators take


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
