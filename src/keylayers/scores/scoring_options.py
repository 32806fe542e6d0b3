# SPDX-License-Identifier: Apache-2.0
"""How modules are scored: a method with its own options. Needs no torch."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from keylayers.errors import ConfigError, did_you_mean
from keylayers.ranges import check_seed
from keylayers.scores.methods import BUILT_IN, DEFAULT_METHOD, Method, find_method, methods
from keylayers.scores.options import EliminationOptions, Granularity


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """A method, an instance of its options class, and the seed of its batches.

    Make it with `scoring_options`. Without a `mask_seed` the batches have the training's seed.
    """

    method: str = DEFAULT_METHOD
    options: Any = field(default_factory=EliminationOptions)
    mask_seed: int | None = None

    def __post_init__(self) -> None:
        expected = find_method(self.method).options
        if type(self.options) is not expected:
            raise ConfigError(
                f"`options` of `method` {self.method} must be {expected.__name__}, got "
                f"{type(self.options).__name__}; make them with scoring_options"
            )
        if self.mask_seed is not None:
            check_seed("mask_seed", self.mask_seed)

    @property
    def granularity(self) -> Granularity:
        """Which modules share a gate."""
        return getattr(self.options, "granularity", "module")

    def num_steps(self, num_gates: int) -> int | None:
        """How many steps the method reports, for progress; None if not known beforehand."""
        return find_method(self.method).num_steps(self.options, num_gates)

    def flat(self) -> dict[str, Any]:
        """The options of all built-in methods and of this one by name, for the record.

        Options of other methods have their defaults, so that all records have the same keys.
        """
        known = {option.name: option.default for m in BUILT_IN for option in fields(m.options)}
        return {"method": self.method, **known, **asdict(self.options), "mask_seed": self.mask_seed}


def scoring_options(
    method: str | ScoringOptions = DEFAULT_METHOD, *, mask_seed: int | None = None, **options: Any
) -> ScoringOptions:
    """A method with options by name, or scoring options that are ready."""
    if isinstance(method, ScoringOptions):
        if options or mask_seed is not None:
            raise ConfigError("scoring options that are ready must come without further options")
        return method
    found = find_method(method)
    for name in options:
        if name not in found.option_names:
            raise ConfigError(_refusal(name, found))
    return ScoringOptions(method=method, options=found.options(**options), mask_seed=mask_seed)


def scoring_from_flat(values: Mapping[str, Any]) -> ScoringOptions:
    """The method that flags or a record name, with the options of all methods side by side.

    Options of other methods must be at their defaults.
    """
    found = find_method(values.get("method", DEFAULT_METHOD))
    own = {name: values[name] for name in found.option_names if name in values}
    for name, option in all_options().items():
        if name in values and name not in own and values[name] != option.default:
            raise ConfigError(_refusal(name, found))
    return scoring_options(found.name, mask_seed=values.get("mask_seed"), **own)


def _refusal(name: str, method: Method) -> str:
    if name in all_options():
        return f"`{name}` must be left out with `method` {method.name}: it has no effect there"
    own = ", ".join(method.option_names) or "none"
    near = did_you_mean(name, method.option_names)
    return f"`{name}` must be an option of `method` {method.name}, which has {own}{near}"


def all_options() -> dict[str, "Field[Any]"]:
    """The options of all methods by name, in the order of the table."""
    found: dict[str, Field[Any]] = {}
    for method in methods().values():
        for option in fields(method.options):
            found.setdefault(option.name, option)
    return found
