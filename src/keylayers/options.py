# SPDX-License-Identifier: Apache-2.0
"""Options: frozen dataclasses whose fields say which values they take. Needs no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from keylayers.errors import ConfigError, did_you_mean

Check = Callable[[str, Any], None]

MAX_SEED = 2**32 - 1  # what NumPy's generators take


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of options, which checks every field."""

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            choices = get_args(option.type) if get_origin(option.type) is Literal else None
            if choices is not None and value not in choices:
                raise ConfigError(
                    f"`{option.name}` must be one of {', '.join(choices)}, got {value!r}"
                    f"{did_you_mean(str(value), choices)}"
                )
            if value is not None and "check" in option.metadata:
                option.metadata["check"](option.name, value)

    def check_one_given(self, **examples: str) -> None:
        """Raise a ConfigError unless exactly one of these options is given; it shows examples."""
        values = {name: getattr(self, name) for name in examples}
        given = [name for name, own in values.items() if own is not None and own is not False]
        if len(given) != 1:
            *others, last = (f"`{name}` ({example})" for name, example in examples.items())
            raise ConfigError(
                f"exactly one of {', '.join(others)} and {last} must be given, got "
                f"{' and '.join(given) or 'none'}"
            )

    def check_left_out(self, where: str, *names: str, why: str = "") -> None:
        """Raise a ConfigError if one of `names` (default: of all) is given, but has no effect.

        `where` says when it has none, such as "without `data`".
        """
        for option in fields(self):
            is_given = getattr(self, option.name) != option.default
            if is_given and (option.name in names or not names):
                name = option.name.rstrip("_")
                raise ConfigError(f"`{name}` must be left out {where}{why}")


def checked(default: Any, check: Check) -> Any:
    """A field whose value must pass `check(name, value)`, unless it is None."""
    return field(default=default, metadata={"check": check})


def at_least(lowest: int) -> Check:
    """A check that refuses values below `lowest`."""

    def check(name: str, value: int | float) -> None:
        if not value >= lowest:
            raise ConfigError(f"`{name}` must be at least {lowest}, got {value}")

    return check


def between(lowest: float, highest: float, why: str) -> Check:
    """A check that refuses values outside a range; `why` follows the range in the message."""

    def check(name: str, value: float) -> None:
        if not lowest <= value <= highest:
            raise ConfigError(f"`{name}` must be from {lowest:g} to {highest:g}{why}, got {value}")

    return check


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
