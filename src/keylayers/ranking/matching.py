# SPDX-License-Identifier: Apache-2.0
"""Bring two rankings onto the same modules: by name, or by relative depth. Needs no torch.

Rankings of the same modules are matched by name. Rankings of models of different shape are matched
by projection and relative depth, block_index / (num_blocks - 1), where the last ranked block counts
as the model's last block. The modules of the shallower model are the common ones. The deeper
model's relative ranks are interpolated linearly between its blocks of the same projection, and are
constant before the first and after the last of them. We interpolate ranks and not scores, because
scores of two models have no common unit.

The result is a standing for each common module: higher is better, NaN is not scored. By name the
standings are the scores, by depth the negative relative ranks.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # loads `scipy.stats` when it is first used
from jaxtyping import Float, Int

from keylayers.errors import RankingError
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

Scores = Float[np.ndarray, " module"]
Standings = Float[np.ndarray, " common"]
Places = Int[np.ndarray, " place"]
ToStandings = Callable[[Scores], Standings]

# Interpolated ranks that should be equal differ by about 1e-16; rounding keeps them tied.
DECIMALS = 12


@dataclass(frozen=True)
class Matched:
    """What two rankings have in common."""

    modules: tuple[RankedModule, ...]  # by depth, those of the shallower model
    to_standings: tuple[ToStandings, ToStandings]  # of scores in the order of either ranking
    is_by_depth: bool = False
    left_out: tuple[str, ...] = ()  # projections that only one of the models has


def match(first: Ranking, second: Ranking) -> Matched:
    """The common modules of two rankings, by name if they have the same names, else by depth."""
    places = {module.name: place for place, module in enumerate(second.modules)}
    if places.keys() != {module.name for module in first.modules}:
        return _match_by_depth(first, second)
    order = np.array([places[module.name] for module in first.modules])
    return Matched(first.modules, (lambda scores: scores, lambda scores: scores[order]))


def scores_of(ranking: Ranking) -> Scores:
    """The scores in the ranking's order, NaN where a module has none."""
    return np.array([module.score for module in ranking.modules], dtype=float)  # None becomes NaN


def relative_ranks(scores: Scores) -> Scores:
    """Ranks divided by the number of scored modules: the best is near 0, the worst at 1.

    Equal scores share the average of their ranks; a module without a score stays NaN.
    """
    ranks = scipy.stats.rankdata(-scores, nan_policy="omit")
    return ranks / max(1, np.count_nonzero(~np.isnan(scores)))


def _match_by_depth(first: Ranking, second: Ranking) -> Matched:
    """The modules of the shallower model; of the first if both are equally deep and large."""
    projections, others = first.projections, second.projections
    shared = tuple(name for name in projections if name in others)
    if not shared:
        raise RankingError(
            "rankings of different modules must share a projection to be compared by depth, but "
            f"one has {', '.join(projections)} and the other {', '.join(others)}"
        )
    shallow, deep = sorted((first, second), key=_size)
    kept, common = np.sort(_places(shallow.modules, shared)), _places(deep.modules, shared)
    grid = tuple(shallow.modules[place] for place in kept)
    depths, deep_depths = _depths(shallow)[kept], _depths(deep)
    columns = [(_places(grid, (name,)), _places(deep.modules, (name,))) for name in shared]

    def own(scores: Scores) -> Standings:
        return -relative_ranks(scores[kept]).round(DECIMALS)

    def interpolated(scores: Scores) -> Standings:
        ranks = np.full(len(scores), np.nan)
        ranks[common] = relative_ranks(scores[common])
        standings = np.full(len(grid), np.nan)
        for targets, sources in columns:
            known = sources[~np.isnan(ranks[sources])]
            if len(known):
                standings[targets] = np.interp(depths[targets], deep_depths[known], ranks[known])
        return -standings.round(DECIMALS)

    return Matched(
        modules=grid,
        to_standings=(own, interpolated) if shallow is first else (interpolated, own),
        is_by_depth=True,
        left_out=tuple(
            name for name in dict.fromkeys((*projections, *others)) if name not in shared
        ),
    )


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
    """The module's block; the first one for modules outside, of which a projection has one."""
    return module.block_index or 0
