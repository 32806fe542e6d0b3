# SPDX-License-Identifier: Apache-2.0
"""How much of a ranking is trained. Needs no torch.

| written | in Python | means |
|---|---|---|
| `0.3` | `0.3` or `Fraction(0.3)` | 30 % of the modules, rounded to the nearest count, a half up |
| `17` | `17` or `Count(17)` | the best 17 modules |
| `0.3x-params` | `Parameters(0.3)` | best modules with at most 30 % of all modules' parameters |
| `0.6x-time` | `Time(0.6)` | modules by score per cost; a training step costs at most 60 % |
| `12GiB` | `Memory(12, "GiB")` | as many of the best modules as a step fits in memory |
| `auto` | `Auto()` | fewest modules nearly as good as all, as `keylayers verify` recommends |
| `--freeze 0.25` | `Freeze(0.25)` | all but the worst 25 % |

A number with a decimal point is a fraction, a number without is a count: `1.0` means all modules,
`1` means one module. If rank-one parts are ranked, budgets count parts and the parameters of an
adapter. Records hold a budget as it is written, which `str()` gives.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from keylayers.errors import ConfigError
from keylayers.options import check_fraction

GIB = 2**30
Unit = Literal["GiB", "MiB", "GB", "MB"]
UNITS: dict[Unit, int] = {"GiB": GIB, "MiB": 2**20, "GB": 10**9, "MB": 10**6}


@dataclass(frozen=True)
class _Share:
    fraction: float
    suffix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        rule = f"as a fraction must be above 0{self.suffix} and at most 1{self.suffix}"
        _check(0 < self.fraction <= 1, rule, self)

    def __str__(self) -> str:
        return f"{_short(self.fraction)}{self.suffix}" if self.suffix else str(self.fraction)


class Fraction(_Share):
    """A share of the modules, or of the rank-one parts if these are ranked."""

    def num_of(self, num_candidates: int, what: str) -> int:
        """The nearest count, a half rounded up; at least 1."""
        return max(1, _rounded(self.fraction * num_candidates))


class Parameters(_Share):
    """A share of the parameters of all modules."""

    suffix = "x-params"


class Time(_Share):
    """A share of the cost of a training step that trains all modules."""

    suffix = "x-time"


@dataclass(frozen=True)
class Count:
    """A number of modules, or of rank-one parts."""

    value: int

    def __post_init__(self) -> None:
        _check(self.value >= 1, "as a count must be at least 1", self)

    def __str__(self) -> str:
        return str(self.value)

    def num_of(self, num_candidates: int, what: str) -> int:
        """The count itself; a ConfigError if the ranking has fewer modules, or parts (`what`)."""
        rule = f"as a count must be between 1 and {num_candidates}, the ranking's {what}"
        _check(self.value <= num_candidates, rule, self)
        return self.value


@dataclass(frozen=True)
class Memory:
    """What a training step may hold."""

    amount: float
    unit: Unit = "GiB"

    def __post_init__(self) -> None:
        _check(0 < self.amount < math.inf, "as memory must be above 0, such as 12GiB", self)

    def __str__(self) -> str:
        return f"{_short(self.amount)}{self.unit}"

    @property
    def num_bytes(self) -> float:
        """The amount in bytes."""
        return self.amount * UNITS[self.unit]


@dataclass(frozen=True)
class Auto:
    """What `keylayers verify` recommended for the ranking."""

    def __str__(self) -> str:
        return "auto"


@dataclass(frozen=True)
class Freeze:
    """All modules, or parts, but the worst `fraction` of them."""

    fraction: float

    def __post_init__(self) -> None:
        check_fraction("freeze", self.fraction)

    def __str__(self) -> str:
        return f"all but the worst {self.fraction}"

    def num_of(self, num_candidates: int, what: str) -> int:
        """How many are left; at least 1."""
        return max(1, num_candidates - _rounded(self.fraction * num_candidates))


Budget = Fraction | Count | Parameters | Time | Memory | Auto | Freeze
WrittenBudget = Budget | float | int | str  # whatever `parse_budget` takes
FORMS: dict[str, Callable[[float], Budget]] = {
    Parameters.suffix: Parameters,
    Time.suffix: Time,
    **{unit: partial(Memory, unit=unit) for unit in UNITS},
}


def parse_budget(written: WrittenBudget) -> Budget:
    """The budget that a text or number writes; a budget is returned as it is."""
    if isinstance(written, Budget):
        return written
    if isinstance(written, float):
        return Fraction(written)
    text = str(written)
    if text == str(Auto()):
        return Auto()
    suffix = next((suffix for suffix in FORMS if text.endswith(suffix)), "")
    amount = text.removesuffix(suffix)
    try:
        number = float(amount)
    except ValueError:
        raise ConfigError(
            f"`budget` must be a fraction such as 0.3, a count such as 17, a fraction of "
            f"parameters such as 0.3x-params or of the cost of a training step such as 0.6x-time, "
            f"or memory such as 12GiB, got {text!r}"
        ) from None
    if suffix:
        return FORMS[suffix](number)
    return Count(int(amount)) if re.fullmatch(r"\s*[-+]?\d+\s*", amount) else Fraction(number)


def _check(is_possible: bool, rule: str, budget: object) -> None:
    if not is_possible:
        hint = "; a fraction needs a decimal point" if isinstance(budget, Count) else ""
        raise ConfigError(f"`budget` {rule}, got {budget}{hint}")


def _short(number: float) -> str:
    """Without `.0`: the unit says what the number is."""
    return str(number).removesuffix(".0")


def _rounded(value: float) -> int:
    """To the nearest integer, a half up."""
    return math.floor(value + 0.5)
