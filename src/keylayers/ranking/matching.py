# SPDX-License-Identifier: Apache-2.0
"""Bring two rankings onto the same modules: by name, or by relative depth. Needs no torch.

Rankings of the same modules are matched by name. Rankings of models of different shape are matched
by projection and relative depth, block_index / (num_blocks - 1), where the model's last ranked
block counts as its last block. The shallower model's modules are the common ones; the deeper
model's relative ranks are interpolated linearly between its blocks of the same projection, and
held constant before the first and after the last of them. Ranks and not scores are interpolated,
for scores of two models share no unit.

The values that come out are standings: higher is better, NaN is not scored. By name they are the
scores themselves, by depth the negative relative ranks.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from keylayers.errors import RankingError
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

Scores = Float[np.ndarray, " module"]
Standings = Float[np.ndarray, " common"]
Places = Int[np.ndarray, " place"]

# Interpolated ranks that are equal by hand differ by about 1e-16; they must stay ties.
DECIMALS = 12


@dataclass(frozen=True)
class Matched:
    """What two rankings have in common.

    Attributes:
        modules: On which they are compared; by depth, those of the shallower model.
        standings_of_first: Scores of the first ranking's modules, in its order -> standings of
            the common modules.
        standings_of_second: The same for the second ranking.
        is_by_depth: Whether they were matched by relative depth instead of by name.
        left_out: Projections that only one of the models has, in model order.
    """

    modules: tuple[RankedModule, ...]
    standings_of_first: Callable[[Scores], Standings]
    standings_of_second: Callable[[Scores], Standings]
    is_by_depth: bool
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Column:
    """One projection: places and depths of its modules in the grid and in the deeper model."""

    targets: Places
    target_depths: Float[np.ndarray, " place"]
    sources: Int[np.ndarray, " source"]
    source_depths: Float[np.ndarray, " source"]


def match(first: Ranking, second: Ranking) -> Matched:
    """The common modules of two rankings, by name where they have the same, else by depth.

    Raises:
        RankingError: the rankings are of different modules and share no projection.
    """
    places = {module.name: place for place, module in enumerate(second.modules)}
    if places.keys() == {module.name for module in first.modules}:
        own = np.arange(len(first.modules))
        other = np.array([places[module.name] for module in first.modules])
        return Matched(first.modules, partial(_take, own), partial(_take, other), False, ())
    return _match_by_depth(first, second)


def scores_of(ranking: Ranking) -> Scores:
    """The scores in the ranking's order, NaN where a module has none."""
    scores = [module.score for module in ranking.modules]
    return np.array([np.nan if score is None else score for score in scores], dtype=float)


def relative_ranks(scores: Scores) -> Scores:
    """Ranks divided by the number of scored modules: the best is near 0, the worst at 1.

    Equal scores share the average of their ranks; a module without a score stays NaN.
    """
    from scipy.stats import rankdata

    ranks = np.full(len(scores), np.nan)
    is_scored = ~np.isnan(scores)
    if is_scored.any():
        ranks[is_scored] = rankdata(-scores[is_scored]) / is_scored.sum()
    return ranks


def _match_by_depth(first: Ranking, second: Ranking) -> Matched:
    """The modules of the shallower model; of the first if both are equally deep and large."""
    projections, others = first.projections, second.projections
    shared = tuple(name for name in projections if name in others)
    if not shared:
        raise RankingError(
            "rankings of different modules must share a projection to be compared by depth, but "
            f"one has {', '.join(projections)} and the other {', '.join(others)}"
        )
    every = dict.fromkeys((*projections, *others))
    is_first_shallower = _size(first) <= _size(second)
    shallow, deep = (first, second) if is_first_shallower else (second, first)
    kept = np.sort(_places(shallow.modules, shared))
    grid = tuple(shallow.modules[place] for place in kept)
    columns = tuple(_column(name, grid, _depths(shallow)[kept], deep) for name in shared)
    own = partial(_own_standings, kept)
    other = partial(_interpolated, columns, _places(deep.modules, shared), len(grid))
    return Matched(
        modules=grid,
        standings_of_first=own if is_first_shallower else other,
        standings_of_second=other if is_first_shallower else own,
        is_by_depth=True,
        left_out=tuple(name for name in every if name not in shared),
    )


def _column(
    projection: str, grid: Sequence[RankedModule], depths: Standings, deep: Ranking
) -> _Column:
    """Where the modules of one projection are in the grid and in the deeper model."""
    targets = _places(grid, (projection,))
    sources = _places(deep.modules, (projection,))
    return _Column(targets, depths[targets], sources, _depths(deep)[sources])


def _take(places: Places, scores: Scores) -> Standings:
    return scores[places]


def _own_standings(kept: Places, scores: Scores) -> Standings:
    return -relative_ranks(scores[kept]).round(DECIMALS)


def _interpolated(
    columns: tuple[_Column, ...], kept: Places, num_common: int, scores: Scores
) -> Standings:
    """Standings of the deeper model at the depths of the common modules."""
    ranks = np.full(len(scores), np.nan)
    ranks[kept] = relative_ranks(scores[kept])
    standings = np.full(num_common, np.nan)
    for column in columns:
        is_scored = ~np.isnan(ranks[column.sources])
        if is_scored.any():
            known, values = column.source_depths[is_scored], ranks[column.sources][is_scored]
            standings[column.targets] = np.interp(column.target_depths, known, values)
    return -standings.round(DECIMALS)


def _size(ranking: Ranking) -> tuple[int, int]:
    """Blocks, then modules: what makes one model shallower than another."""
    return max(map(_block, ranking.modules)), len(ranking.modules)


def _places(modules: Sequence[RankedModule], projections: Collection[str]) -> Places:
    """Places of the modules of these projections, in the order of their blocks."""
    chosen = [place for place, module in enumerate(modules) if module.projection in projections]
    return np.array(sorted(chosen, key=lambda place: _block(modules[place])), dtype=int)


def _depths(ranking: Ranking) -> Scores:
    """Relative depth of every module: 0 in the first block, 1 in the last."""
    blocks = np.array([_block(module) for module in ranking.modules], dtype=float)
    return blocks / max(1.0, blocks.max())


def _block(module: RankedModule) -> int:
    """The block that a module is in; the first for one outside, of which there is one a kind."""
    return module.block_index or 0
