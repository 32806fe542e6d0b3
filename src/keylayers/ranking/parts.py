# SPDX-License-Identifier: Apache-2.0
"""Rank-one parts of the modules' updates: their order, and those that a budget buys.

Parts differ in size, so they are ordered by their score per parameter. Needs no torch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

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
    is_magnitude: bool  # of DoRA: it adds nothing to the rank

    @property
    def score_per_parameter(self) -> float:
        """What decides its place."""
        return self.score / self.num_parameters


def parts_in_order(modules: Sequence[RankedModule]) -> list[Part]:
    """All parts, best first; ties in model order, and in a module by falling singular value."""
    parts = []
    for module in modules:
        own = zip(module.part_scores or (), module.part_parameters or (), strict=True)
        magnitude = module.num_parts - 1 if module.has_magnitude_part else None
        parts += [
            Part(module.name, index, score, size, index == magnitude)
            for index, (score, size) in enumerate(own)
        ]
    return sorted(parts, key=lambda part: -part.score_per_parameter)


def select_parts(
    modules: Sequence[RankedModule], budget: Budget, rank_multiple: int = 1
) -> Selection:
    """The best parts that `budget` buys: a share or a number of parts, or of their parameters.

    The next parts of a module fill its rank up to a multiple of `rank_multiple`. A DoRA module that
    is kept has a magnitude and a rank of at least 1 anyway.
    """
    ordered = parts_in_order(modules)
    sizes = {module.name: module.part_parameters or () for module in modules}

    def size(count: int) -> int:
        kept = _filled(modules, ordered, count, rank_multiple)
        return sum(sizes[name][index] for name, indices in kept.items() for index in indices)

    whole = size(len(ordered))
    if isinstance(budget, Parameters):
        allowed = budget.fraction * whole * (1 + 1e-12)
        count = bisect_right(range(1, len(ordered) + 1), allowed, key=size)
        if count == 0:
            raise ConfigError(
                f"`budget` must allow at least the best part, which takes {size(1):,} parameters, "
                f"but {budget} allows {int(allowed):,}"
            )
    elif isinstance(budget, (Fraction, Count, Freeze)):
        count = budget.num_of(len(ordered), "parts")
    else:
        raise ConfigError(
            f"`budget` {budget} needs a ranking of modules, but this one is of rank-one parts; "
            f"give parameters, such as 0.05x-params, or a share or number of parts"
        )
    kept = _filled(modules, ordered, count, rank_multiple)
    worst = ordered[count - 1].score_per_parameter
    return Selection(
        modules=tuple(module for module in modules if module.name in kept),
        num_candidates=len(modules),
        num_candidate_parameters=whole,
        budget=str(budget),
        num_tied_out=sum(part.score_per_parameter == worst for part in ordered[count:]),
        is_of_mixture=any(module.is_stacked for module in modules),
        parts=kept,
    )


def _filled(
    modules: Sequence[RankedModule], ordered: Sequence[Part], count: int, multiple: int
) -> dict[str, tuple[int, ...]]:
    """Module name -> the best `count` of all parts, and those that fill up its rank."""
    of_module: dict[str, list[Part]] = {}  # all parts, best first
    num_best: dict[str, int] = {}
    for place, part in enumerate(ordered):
        of_module.setdefault(part.module_name, []).append(part)
        if place < count:
            own = num_best.setdefault(part.module_name, 0)
            num_best[part.module_name] = own + (not part.is_magnitude)
    kept = {}
    for name in (module.name for module in modules if module.name in num_best):
        rank = max(1, -(-num_best[name] // multiple)) * multiple
        directions = [part.index for part in of_module[name] if not part.is_magnitude]
        magnitude = [part.index for part in of_module[name] if part.is_magnitude]
        kept[name] = tuple(sorted([*directions[:rank], *magnitude]))
    return kept
