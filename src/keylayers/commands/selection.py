# SPDX-License-Identifier: Apache-2.0
"""The options that select modules of a ranking, as `train`, `prune` and `export` share them."""

from dataclasses import dataclass
from typing import Literal

from keylayers.errors import ConfigError
from keylayers.progress import Progress
from keylayers.ranges import check_at_least
from keylayers.ranking.budget import Auto, Budget, Freeze, parse_budget
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.ranking.verification import auto_budget, verification_file
from keylayers.training.options import FreezeAction

Control = Literal["all", "random", "first", "last", "worst"]


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Which modules of a ranking are selected.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        budget: How much to keep. 0.3: 30 % of the modules. 17: 17 modules. 0.3x-params: modules
            with 30 % of the parameters. 0.6x-time: modules by score per cost whose training step
            costs at most 60 % of a full one. auto: what `keylayers verify` recommended.
        freeze: Instead of a budget: select all but this share of the modules, for example 0.25.
    """

    ranking: str
    budget: str | None = None
    freeze: float | None = None

    def __post_init__(self) -> None:
        _check_one_given(self.budget, self.freeze)


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which modules are trained, and what they are compared with.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        rank_first: Instead of a ranking: train all modules until the loss is stable, rank them,
            stop training the lowest-ranked, and continue the same run.
        budget: How much to train. 0.3: 30 % of the modules. 17: 17 modules. 0.3x-params: modules
            with 30 % of the parameters. 0.6x-time: modules chosen by score per cost, so that a
            training step costs at most 60 % of a full one. 12GiB: as many of the best modules as a
            training step can hold in this much memory. auto: what `keylayers verify` recommended.
        freeze: Instead of a budget: train all but this share of the modules, for example 0.25,
            which is the default of --rank-first.
        action: What happens to the lowest-ranked modules with --rank-first. freeze keeps what they
            have learned, remove sets it to zero.
        steps: Optimiser steps.
        controls: Also train these sets in the same way and show their held-out loss. all: all
            modules. random, first, last (in the network) or worst (in the ranking): as many modules
            as are selected.
    """

    ranking: str | None = None
    rank_first: bool = False
    budget: str | None = None
    freeze: float | None = None
    action: FreezeAction = "freeze"
    steps: int = 300
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        check_at_least("steps", self.steps, 1)
        if self.freeze is not None and not 0 < self.freeze < 1:
            raise ConfigError(f"`freeze` must be above 0 and below 1, got {self.freeze}")

    def check(self) -> None:
        """Raise a ConfigError unless the options select one set of modules."""
        if (self.ranking is None) != self.rank_first:
            given = "both" if self.rank_first else "neither"
            raise ConfigError(
                f"exactly one of `ranking` (a file) and `rank_first` (rank inside the run) must be "
                f"given, got {given}"
            )
        if self.rank_first:
            self._check_rank_first()
            return
        _check_one_given(self.budget, self.freeze)
        if self.action != "freeze":
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
        ConfigError: the budget has no known form, or there is none to recommend.
        RankingError: `auto`, but the ranking is not verified as it is.
    """
    if wanted.freeze is not None:
        return Freeze(wanted.freeze)
    budget = parse_budget(wanted.budget or "")
    if isinstance(budget, Auto):
        assert wanted.ranking is not None
        return auto_budget(ranking, verification_file(wanted.ranking))
    return budget


def note_ties(selection: Selection, progress: Progress) -> None:
    """Say how many modules were left out by their place in the model alone."""
    if selection.num_tied_out:
        progress.note(
            f"{selection.num_tied_out} modules left out have the same score as the last one taken; "
            f"ties go by the model's order"
        )


def _check_one_given(budget: str | None, freeze: float | None) -> None:
    if (budget is None) == (freeze is None):
        given = "neither" if budget is None else "both"
        raise ConfigError(
            f"exactly one of `budget` (such as 0.3) and `freeze` (such as 0.25) must be given, got "
            f"{given}"
        )
