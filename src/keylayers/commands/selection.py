# SPDX-License-Identifier: Apache-2.0
"""Which modules of a ranking are taken, and what is trained beside them."""

from dataclasses import dataclass
from typing import Literal

from keylayers.errors import ConfigError
from keylayers.ranges import check_above_zero, check_at_least
from keylayers.ranking.budget import Auto, Budget, Freeze, parse_budget
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.verification import auto_budget, verification_file
from keylayers.training.options import FreezeAction

Control = Literal["all", "random", "first", "last", "worst"]


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Which modules of a ranking are taken.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        budget: How much is taken: 0.3 is 30 % of the modules, 17 is 17 modules, 0.3x-params is
            modules with 30 % of the parameters, 0.6x-time is those worth most whose training step
            costs at most 60 %, auto is what `keylayers verify` recommended.
        freeze: Instead of a budget: take all but the worst share, such as 0.25.
    """

    ranking: str
    budget: str | None = None
    freeze: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.freeze is None):
            given = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"exactly one of `budget` (such as 0.3) and `freeze` (such as 0.25) must be given, "
                f"got {given}"
            )


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which modules are trained, and against what they are compared.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        rank_first: Instead of a ranking: train all modules until the loss is stable, rank them,
            stop training the worst, and let the same run go on.
        budget: How much is trained: 0.3 is 30 % of the modules, 17 is 17 modules, 0.3x-params is
            modules with 30 % of the parameters, 0.6x-time is those worth most whose training step
            costs at most 60 %, 12GiB is those worth most whose training step holds at most so much
            memory, auto is what `keylayers verify` recommended.
        freeze: Instead of a budget: train all but the worst share, such as 0.25, which is what
            --rank-first takes if nothing is given.
        action: What happens to the worst modules inside the run (--rank-first): freeze keeps what
            they have learned, remove sets it to zero.
        steps: Optimiser steps. From the command line: as many as stage 1 of the ranking took, if
            it had one.
        prefix_cache_gib: Keep what the frozen blocks below the lowest trained module compute in a
            file of so many GiB beside the output, and read it in later epochs. The file is gone
            when training ends, however it ends.
        controls: Also train these sets of modules in the same way and show their held-out loss:
            all; or as many modules as selected, random, first, last (of the network) or worst (of
            the ranking).
    """

    ranking: str | None = None
    rank_first: bool = False
    budget: str | None = None
    freeze: float | None = None
    action: FreezeAction = "freeze"
    steps: int = 300
    prefix_cache_gib: float | None = None
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        check_at_least("steps", self.steps, 1)
        if self.prefix_cache_gib is not None:
            check_above_zero("prefix_cache_gib", self.prefix_cache_gib)
        if self.freeze is not None and not 0 < self.freeze < 1:
            raise ConfigError(f"`freeze` must be above 0 and below 1, got {self.freeze}")
        if (self.ranking is None) != self.rank_first:
            given = "both" if self.rank_first else "neither"
            raise ConfigError(
                f"exactly one of `ranking` (a file) and `rank_first` (rank inside the run) must be "
                f"given, got {given}"
            )
        if self.rank_first:
            self._check_rank_first()
        elif (self.budget is None) == (self.freeze is None):
            given = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"exactly one of `budget` (such as 0.3) and `freeze` (such as 0.25) must be given, "
                f"got {given}"
            )
        elif self.action != "freeze":
            raise ConfigError(
                f"`action` must be left out without `rank_first`, got {self.action}: modules that "
                f"a ranking leaves out are never trained"
            )

    def _check_rank_first(self) -> None:
        if self.budget is not None:
            raise ConfigError(
                f"`budget` must be left out with `rank_first`, got {self.budget}; give the share "
                f"that is no longer trained as `freeze`, such as 0.25"
            )
        if self.steps < 2:
            raise ConfigError(
                f"`steps` must be at least 2 with `rank_first`, one before the ranking and one "
                f"after it, got {self.steps}"
            )
        if self.prefix_cache_gib is not None:
            raise ConfigError(
                f"`prefix_cache_gib` must be left out with `rank_first`, which begins with all "
                f"modules trained, got {self.prefix_cache_gib:g}"
            )
        if "worst" in self.controls:
            raise ConfigError(
                "`controls` with `rank_first` must be of all, random, first and last, got worst; "
                "train it on the ranking that this run writes"
            )

    @property
    def resolved_freeze(self) -> float:
        """The share that is no longer trained with `rank_first`; a quarter as in the paper."""
        return 0.25 if self.freeze is None else self.freeze


def budget_of(wanted: BudgetOptions | SelectionOptions, ranking: Ranking) -> Budget:
    """The budget that the options ask for; `auto` is looked up in the ranking's verification.

    Raises:
        ConfigError: the budget has no known form, or `auto` has none to give.
        RankingError: `auto`, but the ranking is not verified as it is.
    """
    if wanted.freeze is not None:
        return Freeze(wanted.freeze)
    budget = parse_budget(wanted.budget or "")
    if isinstance(budget, Auto):
        assert wanted.ranking is not None
        return auto_budget(ranking, verification_file(wanted.ranking))
    return budget
