# SPDX-License-Identifier: Apache-2.0
"""Agreement of rankings, beside chance and noise. Needs no torch.

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
from jaxtyping import Bool, Float

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
Scored = Float[np.ndarray, " scored"]


@dataclass(frozen=True)
class Agreement:
    """How far two rankings agree.

    The intervals cover 95 % of what the noise of the batches within each run leaves open: every
    score is drawn again from a normal distribution with its standard error, independently, save
    that modules which share a gate share the noise. They do not cover other seeds, other data or
    other fine-tunes. The drawn scores hold the noise of the run twice, so that an interval lies
    lower than its value where the noise is large, and may even end below it.

    Attributes:
        first: Index of one ranking.
        second: Index of the other.
        kind: What sets the two runs apart, as `difference` tells.
        num_modules: On how many modules they are compared.
        num_scored: How many of them both rankings score.
        jaccard: Modules in both selections, divided by modules in either.
        jaccard_interval: Its 95 % interval, the selections keeping their sizes; None unless both
            rankings carry a standard error for every score.
        chance_jaccard: The expected Jaccard of two random selections of the same sizes; of two
            random orders of whole blocks, or of whole projections, where both rankings are such.
        is_chance_of_groups: Whether it is of whole blocks or projections: a mean over draws then.
        corrected: (jaccard - chance) / (1 - chance): 0 is chance, 1 the same set; None where
            chance is 1.
        tau: Kendall's tau-b of the modules that both score; ties are corrected for. None where
            there are fewer than two, or all are tied in one ranking.
        tau_interval: Its 95 % interval; None as for Jaccard, or where tau is None.
        top_weighted_tau: Tau with additive hyperbolic weights, 1 / rank of one module plus 1 / rank
            of the other: disorder at the top counts most. The mean of ranking by the first and by
            the second, hence symmetric. None where tau is None.
        is_by_depth: Whether the rankings are of different modules, matched by projection and
            relative depth (`keylayers.ranking.matching`).
        left_out: Projections that only one of them has, which the comparison leaves out.
    """

    first: int
    second: int
    kind: Difference
    num_modules: int
    num_scored: int
    jaccard: float
    jaccard_interval: Interval | None
    chance_jaccard: float
    is_chance_of_groups: bool
    corrected: float | None
    tau: float | None
    tau_interval: Interval | None
    top_weighted_tau: float | None
    is_by_depth: bool
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class KindMean:
    """Means over the pairs of one kind; a mean is None where no pair has the measure."""

    kind: Difference
    num_pairs: int
    jaccard: float
    chance_jaccard: float
    corrected: float | None
    tau: float | None
    top_weighted_tau: float | None


def agreement(
    rankings: Sequence[Ranking], budget: WrittenBudget, *, has_intervals: bool = True
) -> list[Agreement]:
    """The agreement of every pair of rankings at one budget, in order of their indices.

    Rankings of different modules are matched by relative depth and projection. The draws behind
    the intervals depend on the index of a ranking and on nothing else that is random.

    Args:
        rankings: Two or more.
        budget: What the selections that are compared may take.
        has_intervals: Draw the scores anew for the intervals, which takes most of the time.

    Raises:
        RankingError: two rankings share no projection, or the budget reaches modules without a
            score.
        ConfigError: the budget has no known form, or buys nothing or more than there is.
    """
    parsed = parse_budget(budget)
    sides = [
        _Side(index, ranking, _drawn_scores(ranking, index) if has_intervals else None)
        for index, ranking in enumerate(rankings)
    ]
    return [_agreement_of(first, second, parsed) for first, second in combinations(sides, 2)]


def mean_by_kind(pairs: Sequence[Agreement]) -> list[KindMean]:
    """Means over the pairs of each kind that occurs, in the order of `DIFFERENCES`."""
    means = []
    for kind in DIFFERENCES:
        own = [pair for pair in pairs if pair.kind == kind]
        if own:
            means.append(
                KindMean(
                    kind=kind,
                    num_pairs=len(own),
                    jaccard=fmean(pair.jaccard for pair in own),
                    chance_jaccard=fmean(pair.chance_jaccard for pair in own),
                    corrected=_mean([pair.corrected for pair in own]),
                    tau=_mean([pair.tau for pair in own]),
                    top_weighted_tau=_mean([pair.top_weighted_tau for pair in own]),
                )
            )
    return means


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


def _groups(modules: Sequence[RankedModule], standings: Standings) -> Places | None:
    """The block or the projection of each module, as a number, if one standing is all that it has.

    None where single modules have standings of their own, or all have the same.
    """
    if np.isnan(standings).any() or len(np.unique(standings)) < 2:
        return None
    for labels in (
        [str(module.block_index) for module in modules],
        [module.projection for module in modules],
    ):
        _, groups = np.unique(labels, return_inverse=True)
        values = [np.unique(standings[groups == group]) for group in range(groups.max() + 1)]
        if all(len(one) == 1 for one in values) and len(values) < len(modules):
            return groups
    return None


def _chance_of_groups(first: Places, second: Places, size: int, other_size: int) -> float:
    """Mean Jaccard of the best so many under random orders of the groups, over draws."""
    generator = np.random.default_rng(DRAW_SEED)

    def best(groups: Places, count: int) -> Bool[np.ndarray, " common"]:
        return _is_best(generator.permutation(groups.max() + 1)[groups].astype(float), count)

    found = []
    for _ in range(NUM_ORDERS):
        taken, others = best(first, size), best(second, other_size)
        found.append(np.count_nonzero(taken & others) / np.count_nonzero(taken | others))
    return fmean(found)


@dataclass(frozen=True)
class _Side:
    """One ranking of a pair; draws is None where a score lacks its standard error."""

    index: int
    ranking: Ranking
    draws: Float[np.ndarray, "draw module"] | None


def _agreement_of(first: _Side, second: _Side, budget: Budget) -> Agreement:
    matched = match(first.ranking, second.ranking)
    standings = (
        matched.standings_of_first(scores_of(first.ranking)),
        matched.standings_of_second(scores_of(second.ranking)),
    )
    chosen = (
        _names(first.ranking, standings[0], matched, budget),
        _names(second.ranking, standings[1], matched, budget),
    )
    sizes = len(chosen[0]), len(chosen[1])
    jaccard = len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])
    groups = tuple(_groups(matched.modules, one) for one in standings)
    is_grouped = groups[0] is not None and groups[1] is not None
    chance = (
        _chance_of_groups(groups[0], groups[1], *sizes)
        if groups[0] is not None and groups[1] is not None
        else chance_jaccard(len(matched.modules), *sizes)
    )
    jaccard_interval, tau_interval = _intervals(first, second, matched, sizes)
    both = _scored_by_both(*standings)
    return Agreement(
        first=first.index,
        second=second.index,
        kind=difference(first.ranking, second.ranking),
        num_modules=len(matched.modules),
        num_scored=len(both[0]),
        jaccard=jaccard,
        jaccard_interval=jaccard_interval,
        chance_jaccard=chance,
        is_chance_of_groups=is_grouped,
        corrected=None if chance == 1 else (jaccard - chance) / (1 - chance),
        tau=_tau(*both),
        tau_interval=tau_interval,
        top_weighted_tau=_top_weighted_tau(*both),
        is_by_depth=matched.is_by_depth,
        left_out=matched.left_out,
    )


def _names(ranking: Ranking, standings: Standings, matched: Matched, budget: Budget) -> set[str]:
    """What the budget buys of the common modules; by name, exactly the ranking's own selection."""
    if not matched.is_by_depth:
        return set(ranking.select(budget).names)
    modules = tuple(
        replace(module, score=None if math.isnan(standing) else float(standing))
        for module, standing in zip(matched.modules, standings, strict=True)
    )
    return set(Ranking(modules, ranking.method).select(budget).names)


def _scored_by_both(first: Standings, second: Standings) -> tuple[Scored, Scored]:
    is_scored = ~(np.isnan(first) | np.isnan(second))
    return first[is_scored], second[is_scored]


def _tau(first: Scored, second: Scored) -> float | None:
    """Tau-b; None where it is not defined."""
    from scipy.stats import kendalltau

    if len(first) < 2:
        return None
    # The p-value is not used: its exact form is slow, its asymptotic one fails for two values.
    method = "asymptotic" if len(first) > 2 else "auto"
    tau = float(kendalltau(first, second, variant="b", method=method).statistic)
    return None if math.isnan(tau) else tau


def _top_weighted_tau(first: Scored, second: Scored) -> float | None:
    """Top-weighted tau; scipy weighs the highest values most, and these are the best modules."""
    from scipy.stats import weightedtau

    if len(first) < 2:
        return None
    tau = float(weightedtau(first, second, rank=True, weigher=None, additive=True).statistic)
    return None if math.isnan(tau) else tau


def _drawn_scores(ranking: Ranking, index: int) -> Float[np.ndarray, "draw module"] | None:
    """Scores plus normal noise of their standard errors; the noise is one for each gate."""
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
    jaccards, taus = [], []
    for scores, other_scores in zip(first.draws, second.draws, strict=True):
        standings = matched.standings_of_first(scores)
        others = matched.standings_of_second(other_scores)
        is_taken = _is_best(standings, sizes[0]), _is_best(others, sizes[1])
        union = np.count_nonzero(is_taken[0] | is_taken[1])
        jaccards.append(np.count_nonzero(is_taken[0] & is_taken[1]) / union)
        tau = _tau(*_scored_by_both(standings, others))
        if tau is not None:
            taus.append(tau)
    return _interval(jaccards), _interval(taus)


def _is_best(standings: Standings, count: int) -> Bool[np.ndarray, " common"]:
    """Which modules are the `count` best; ties in the order of the modules, NaN last."""
    is_best = np.zeros(len(standings), dtype=bool)
    is_best[np.argsort(-standings, kind="stable")[:count]] = True
    return is_best


def _interval(values: Sequence[float]) -> Interval | None:
    """The central 95 % of the values."""
    if not values:
        return None
    tail = (1 - COVERED_FRACTION) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
