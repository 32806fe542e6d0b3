# SPDX-License-Identifier: Apache-2.0
"""Agreement of rankings, compared with chance and noise. Needs no torch.

For every pair: Jaccard of the selections at a budget, Kendall's tau-b of all modules that both
rankings score, and the top-weighted tau of the same modules. Tau is 1 for the same order, 0 for
unrelated orders, -1 for opposite ones. Both taus are scipy's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from statistics import fmean

import numpy as np
import scipy  # loads `scipy.stats` when it is first used
from jaxtyping import Float

from keylayers.ranking.budget import Budget, WrittenBudget, parse_budget
from keylayers.ranking.differences import DIFFERENCES, Difference, difference
from keylayers.ranking.matching import Matched, Places, Standings, match, scores_of
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

NUM_DRAWS = 500
NUM_ORDERS = 2000  # of the groups, for chance: its standard error is about 0.003
DRAW_SEED = 0
COVERED_FRACTION = 0.95

Interval = tuple[float, float]
Draws = Float[np.ndarray, "draw _"]


@dataclass(frozen=True)
class Agreement:
    """How far two rankings agree.

    The 95 % intervals show the noise of the batches within each run: every score is drawn again
    from a normal distribution with its standard error, independently, except that modules which
    share a gate share the noise. Other seeds, other data and other fine-tunes are not covered. A
    drawn score holds the noise of the run twice, so an interval lies lower than its value where the
    noise is large, and may even end below it. There is an interval if both rankings have a standard
    error for every score.
    """

    first: int  # index of one ranking
    second: int
    kind: Difference  # what sets the two runs apart
    num_modules: int  # that are compared
    num_scored: int  # that both rankings score
    jaccard: float  # modules in both selections, divided by modules in either
    jaccard_interval: Interval | None  # at fixed sizes of the selections
    # Expected of two random selections of the same sizes. Where both rankings order only whole
    # blocks or projections, of two random orders of these: the mean of some draws.
    chance_jaccard: float
    is_chance_of_groups: bool
    corrected: float | None  # (jaccard - chance) / (1 - chance); None where chance is 1
    tau: float | None  # Kendall's tau-b of the modules that both score; None without an order
    tau_interval: Interval | None
    # Tau with additive hyperbolic weights, 1 / rank of one module plus 1 / rank of the other, so
    # that disorder at the top counts most; the mean of weighing by either ranking.
    top_weighted_tau: float | None
    is_by_depth: bool  # the models differ and were matched by projection and relative depth
    left_out: tuple[str, ...]  # projections that only one of the rankings has


@dataclass(frozen=True)
class KindMean:
    """Means over the pairs of one kind; a mean is None where no pair has the measure."""

    kind: Difference
    num_pairs: int
    jaccard: float | None
    chance_jaccard: float | None
    corrected: float | None
    tau: float | None
    top_weighted_tau: float | None


def agreement(
    rankings: Sequence[Ranking], budget: WrittenBudget, *, has_intervals: bool = True
) -> list[Agreement]:
    """The agreement of every pair of rankings at one budget, in order of their indices.

    Rankings of different modules are matched by projection and relative depth.

    Args:
        rankings: Two or more.
        budget: The budget of the selections that are compared.
        has_intervals: Whether to compute the intervals, which takes most of the time.

    Raises:
        RankingError: two rankings share no projection, or modules in the budget have no score.
        ConfigError: the budget has no known form, or buys nothing or more than there is.
    """
    parsed = parse_budget(budget)
    sides = [
        _Side(index, ranking, _drawn_scores(ranking, index) if has_intervals else None)
        for index, ranking in enumerate(rankings)
    ]
    return [_agreement_of(*pair, parsed) for pair in combinations(sides, 2)]


def mean_by_kind(pairs: Sequence[Agreement]) -> list[KindMean]:
    """Means over the pairs of each kind that occurs, in the order of `DIFFERENCES`."""

    def means(own: Sequence[Agreement]) -> list[float | None]:
        names = ("jaccard", "chance_jaccard", "corrected", "tau", "top_weighted_tau")
        known = [[v for pair in own if (v := getattr(pair, name)) is not None] for name in names]
        return [fmean(values) if values else None for values in known]

    by_kind = {kind: [pair for pair in pairs if pair.kind == kind] for kind in DIFFERENCES}
    return [KindMean(kind, len(own), *means(own)) for kind, own in by_kind.items() if own]


def chance_jaccard(num_modules: int, size: int, other_size: int) -> float:
    """Expected Jaccard index of two independent random subsets of the given sizes.

    The overlap k is hypergeometric; the mean of k / (size + other_size - k) is summed exactly.
    """
    total, both = comb(num_modules, other_size), size + other_size
    return sum(
        comb(size, k) * comb(num_modules - size, other_size - k) / total * k / (both - k)
        for k in range(max(0, both - num_modules), min(size, other_size) + 1)
    )


@dataclass(frozen=True)
class _Side:
    """One ranking of a pair; draws is None where a score lacks its standard error."""

    index: int
    ranking: Ranking
    draws: Draws | None


def _agreement_of(first: _Side, second: _Side, budget: Budget) -> Agreement:
    matched = match(first.ranking, second.ranking)
    own, other = (
        to_standings(scores_of(side.ranking))
        for side, to_standings in zip((first, second), matched.to_standings, strict=True)
    )
    chosen = _names(first.ranking, own, matched, budget)
    others = _names(second.ranking, other, matched, budget)
    sizes = len(chosen), len(others)
    jaccard = len(chosen & others) / len(chosen | others)
    chance, is_chance_of_groups = _chance(matched.modules, own, other, sizes)
    jaccard_interval, tau_interval = _intervals(first, second, matched, sizes)
    return Agreement(
        first=first.index,
        second=second.index,
        kind=difference(first.ranking, second.ranking),
        num_modules=len(matched.modules),
        num_scored=int(np.count_nonzero(~np.isnan(own + other))),
        jaccard=jaccard,
        jaccard_interval=jaccard_interval,
        chance_jaccard=chance,
        is_chance_of_groups=is_chance_of_groups,
        corrected=None if chance == 1 else (jaccard - chance) / (1 - chance),
        tau=_tau(own, other),
        tau_interval=tau_interval,
        top_weighted_tau=_tau(own, other, is_top_weighted=True),
        is_by_depth=matched.is_by_depth,
        left_out=matched.left_out,
    )


def _names(ranking: Ranking, standings: Standings, matched: Matched, budget: Budget) -> set[str]:
    """What the budget buys of the common modules; by name, exactly the ranking's own selection."""
    if not matched.is_by_depth:
        return set(ranking.select(budget).names)
    modules = tuple(
        replace(module, score=None if math.isnan(standing) else standing).without_parts()
        for module, standing in zip(matched.modules, standings.tolist(), strict=True)
    )
    return set(Ranking(modules, ranking.method).select(budget).names)


def _chance(
    modules: Sequence[RankedModule], own: Standings, other: Standings, sizes: tuple[int, int]
) -> tuple[float, bool]:
    """The Jaccard index expected by chance, and whether it is that of random orders of groups."""
    groups, other_groups = _groups(modules, own), _groups(modules, other)
    if groups is None or other_groups is None:
        return chance_jaccard(len(modules), *sizes), False
    generator = np.random.default_rng(DRAW_SEED)

    def drawn(groups: Places) -> Standings:
        return generator.permutation(groups.max() + 1)[groups].astype(float)

    draws = (_jaccard(drawn(groups), drawn(other_groups), sizes) for _ in range(NUM_ORDERS))
    return fmean(draws), True


def _groups(modules: Sequence[RankedModule], standings: Standings) -> Places | None:
    """The number of each module's block or projection, if only whole ones have an order."""
    if np.isnan(standings).any() or len(np.unique(standings)) < 2:
        return None
    kinds = [(str(module.block_index), module.projection) for module in modules]
    for labels in zip(*kinds, strict=True):
        _, groups = np.unique(labels, return_inverse=True)
        values = set(zip(groups.tolist(), standings.tolist(), strict=True))
        if len(values) == groups.max() + 1 < len(modules):
            return groups
    return None


def _tau(first: Standings, second: Standings, *, is_top_weighted: bool = False) -> float | None:
    """A rank correlation of the modules that both score; None where it is not defined."""
    scored = ~np.isnan(first + second)
    if np.count_nonzero(scored) < 2:
        return None
    if is_top_weighted:  # scipy gives the highest values most weight, and these are the best
        found = scipy.stats.weightedtau(first[scored], second[scored])
    else:  # of the p-values, which we do not use, the exact is slow, the other fails for two values
        method = "asymptotic" if np.count_nonzero(scored) > 2 else "auto"
        found = scipy.stats.kendalltau(first[scored], second[scored], method=method)
    return None if math.isnan(found.statistic) else float(found.statistic)


def _drawn_scores(ranking: Ranking, index: int) -> Draws | None:
    """Scores plus normal noise of their standard errors; None where a score has no error.

    The draws depend on nothing but the index, so other rankings do not change an interval.
    """
    scored = [module for module in ranking.modules if module.score is not None]
    if not scored or any(module.standard_error is None for module in scored):
        return None
    errors = np.array([module.standard_error or 0.0 for module in ranking.modules])
    gates = [_gate(module, ranking.granularity) for module in ranking.modules]
    places = {gate: place for place, gate in enumerate(dict.fromkeys(gates))}
    generator = np.random.default_rng((DRAW_SEED, index))
    noise = generator.standard_normal((NUM_DRAWS, len(places)))
    return scores_of(ranking) + noise[:, [places[gate] for gate in gates]] * errors


def _gate(module: RankedModule, granularity: str) -> int | str:
    """What the modules that share a gate, and so a score, have in common."""
    if granularity == "block" and module.block_index is not None:
        return module.block_index
    return module.projection if granularity == "projection" else module.name


def _intervals(
    first: _Side, second: _Side, matched: Matched, sizes: tuple[int, int]
) -> tuple[Interval | None, Interval | None]:
    """The intervals of Jaccard and tau-b over the draws; both None where a side has no draws."""
    if first.draws is None or second.draws is None:
        return None, None
    of_first, of_second = matched.to_standings
    drawn = zip(map(of_first, first.draws), map(of_second, second.draws), strict=True)
    found = [(_jaccard(*pair, sizes), _tau(*pair)) for pair in drawn]
    taus = [tau for _, tau in found if tau is not None]
    return _interval([jaccard for jaccard, _ in found]), _interval(taus)


def _jaccard(first: Standings, second: Standings, sizes: tuple[int, int]) -> float:
    """Of the best modules of both, that many; ties in the order of the modules, NaN last."""
    best, others = (
        set(np.argsort(-standings, kind="stable")[:size].tolist())
        for standings, size in zip((first, second), sizes, strict=True)
    )
    return len(best & others) / len(best | others)


def _interval(values: Sequence[float]) -> Interval | None:
    """The central 95 % of the values."""
    tail = (1 - COVERED_FRACTION) / 2
    return tuple(np.quantile(values, [tail, 1 - tail]).tolist()) if values else None
