# SPDX-License-Identifier: Apache-2.0
"""Agreement: how far rankings pick the same modules, beside chance. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from keylayers.errors import RankingError
from keylayers.ranking import Ranking
from keylayers.selection import Budget


@dataclass(frozen=True)
class Agreement:
    """Overlap of two selections of equal size.

    Attributes:
        jaccard: Modules in both, divided by modules in either.
        chance_jaccard: The expected Jaccard of two random selections of the same sizes.
        corrected: (jaccard - chance) / (1 - chance): 0 is chance, 1 the same set; None where
            chance is 1.
    """

    first: int
    second: int
    jaccard: float
    chance_jaccard: float
    corrected: float | None


def agreement(rankings: Sequence[Ranking], budget: Budget) -> list[Agreement]:
    """The agreement of every pair of rankings at one budget, in order of their indices.

    Raises:
        RankingError: the rankings are not of the same modules.
    """
    candidates = [{module.name for module in ranking.modules} for ranking in rankings]
    for index, names in enumerate(candidates):
        if names != candidates[0]:
            odd = sorted(names ^ candidates[0])
            raise RankingError(
                f"rankings must be of the same modules to be compared, but ranking {index + 1} and "
                f"the first differ in {len(odd)}, first {odd[0]}"
            )
    chosen = [set(ranking.select(budget).names) for ranking in rankings]
    pairs = []
    for first, second in combinations(range(len(rankings)), 2):
        jaccard = len(chosen[first] & chosen[second]) / len(chosen[first] | chosen[second])
        chance = chance_jaccard(len(candidates[0]), len(chosen[first]), len(chosen[second]))
        corrected = None if chance == 1 else (jaccard - chance) / (1 - chance)
        pairs.append(Agreement(first, second, jaccard, chance, corrected))
    return pairs


def chance_jaccard(num_modules: int, size: int, other_size: int) -> float:
    """Expected Jaccard index of two independent random subsets of the given sizes.

    The overlap k is hypergeometric; the mean of k / (size + other_size - k) is summed exactly.
    """
    total = comb(num_modules, other_size)
    lowest, highest = max(0, size + other_size - num_modules), min(size, other_size)
    return sum(
        comb(size, k)
        * comb(num_modules - size, other_size - k)
        / total
        * k
        / (size + other_size - k)
        for k in range(lowest, highest + 1)
    )
