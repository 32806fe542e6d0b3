# SPDX-License-Identifier: Apache-2.0
"""How modules are scored: a method with its own options. Needs no torch."""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from keylayers.errors import ConfigError, did_you_mean
from keylayers.options import check_seed
from keylayers.scores.methods import BUILT_IN, DEFAULT_METHOD, find_method, methods
from keylayers.scores.options import Granularity, LearnedOptions


@dataclass(frozen=True)
class ScoringOptions:
    """A method, its options, and the seed of its batches; made by `scoring_options`.

    Without a `mask_seed` the batches have the training's seed.
    """

    method: str
    options: Any
    mask_seed: int | None

    @property
    def granularity(self) -> Granularity:
        """Which modules share a gate."""
        return getattr(self.options, "granularity", "module")

    @property
    def learns_gates(self) -> bool:
        """Whether scores are learned step by step; such methods log and stop by themselves."""
        return isinstance(self.options, LearnedOptions)

    @property
    def is_repeated(self) -> bool:
        """Whether the method runs again on other batches until the selection is stable."""
        return not self.learns_gates and getattr(self.options, "until_stable", None) is not None

    def num_steps(self, num_gates: int) -> int | None:
        """How many steps the method reports, for progress; None if not known beforehand."""
        count = find_method(self.method).num_steps
        return None if count is None or self.is_repeated else count(self.options, num_gates)

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
    own = found.option_names
    for name in options:
        if name not in own and name in all_options():
            raise ConfigError(
                f"`{name}` must be left out with `method` {method}: it has no effect there"
            )
        if name not in own:
            raise ConfigError(
                f"`{name}` must be an option of `method` {method}, which has "
                f"{', '.join(own) or 'none'}{did_you_mean(name, own)}"
            )
    if mask_seed is not None:
        check_seed("mask_seed", mask_seed)
    return ScoringOptions(method, found.options(**options), mask_seed)


def scoring_from_flat(values: Mapping[str, Any]) -> ScoringOptions:
    """The method that flags or a record name, with the options of all methods side by side.

    Options of other methods are ignored at their defaults, and refused otherwise.
    """
    found = find_method(values.get("method", DEFAULT_METHOD))
    given = {
        name: values[name]
        for name, option in all_options().items()
        if name in values and (name in found.option_names or values[name] != option.default)
    }
    return scoring_options(found.name, mask_seed=values.get("mask_seed"), **given)


def all_options() -> dict[str, "Field[Any]"]:
    """The options of all methods by name, in the order of the table."""
    of_all = (option for method in methods().values() for option in fields(method.options))
    return {option.name: option for option in of_all}  # those of one name have the same default
