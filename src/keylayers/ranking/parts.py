# SPDX-License-Identifier: Apache-2.0
"""Rank-one parts of the modules' updates: their order, and those that a budget buys.

Parts differ in size, so they are ordered by their score per parameter. Needs no torch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from keylayers.errors import ConfigError
from keylayers.ranking.budget import Budget, Count, Fraction, Freeze, Parameters
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.selection import Selection


@dataclass(frozen=True)
class Part:
    """One rank-one part `σ u vᵀ` of a module's update."""

    module_name: str
    index: int  # from 0, by falling singular value
    score: float
    num_parameters: int  # that it adds to an adapter

    @property
    def score_per_parameter(self) -> float:
        """What decides its place."""
        return self.score / self.num_parameters


def parts_in_order(modules: Sequence[RankedModule]) -> list[Part]:
    """All parts, best first; ties in model order, and in a module by falling singular value."""
    parts = [
        Part(module.name, index, score, size)
        for module in modules
        for index, (score, size) in enumerate(
            zip(module.part_scores or (), module.part_parameters or (), strict=True)
        )
    ]
    return sorted(parts, key=lambda part: -part.score_per_parameter)


def select_parts(modules: Sequence[RankedModule], budget: Budget) -> Selection:
    """The best parts that `budget` buys: a share or a number of parts, or of their parameters."""
    ordered = parts_in_order(modules)
    sizes = [part.num_parameters for part in ordered]
    if isinstance(budget, Parameters):
        allowed = budget.fraction * sum(sizes)
        count = bisect_right(list(accumulate(sizes)), allowed * (1 + 1e-12))
        if count == 0:
            raise ConfigError(
                f"`budget` must allow at least the best part, which has {sizes[0]:,} parameters, "
                f"but {budget} allows {int(allowed):,}"
            )
    elif isinstance(budget, (Fraction, Count, Freeze)):
        count = budget.num_of(len(ordered), "parts")
    else:
        raise ConfigError(
            f"`budget` {budget} needs a ranking of modules, but this one is of rank-one parts; "
            f"give parameters, such as 0.05x-params, or a share or number of parts"
        )
    kept: dict[str, list[int]] = {}
    for part in ordered[:count]:
        kept.setdefault(part.module_name, []).append(part.index)
    worst = ordered[count - 1].score_per_parameter
    return Selection(
        modules=tuple(module for module in modules if module.name in kept),
        num_candidates=len(modules),
        num_candidate_parameters=sum(sizes),
        budget=str(budget),
        num_tied_out=sum(part.score_per_parameter == worst for part in ordered[count:]),
        is_of_mixture=any(module.is_stacked for module in modules),
        parts={name: tuple(sorted(indices)) for name, indices in kept.items()},
    )
