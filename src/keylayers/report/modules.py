# SPDX-License-Identifier: Apache-2.0
"""A ranking's modules as reports lay them out: a grid of blocks by projections, and table rows."""

from typing import Any

from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking


def grid(ranking: Ranking) -> dict[str, list[RankedModule | None]]:
    """Block -> its module of each projection, or None. Embeddings and head are `outside`, first."""
    blocks: dict[str, dict[str, RankedModule]] = {}
    for module in sorted(ranking.modules, key=_block_order):
        blocks.setdefault(_block(module), {})[module.projection] = module
    return {
        block: [modules.get(projection) for projection in ranking.projections]
        for block, modules in blocks.items()
    }


def module_rows(ranking: Ranking) -> list[dict[str, Any]]:
    """One row per module, best first; `place` counts from 1 in the order that budgets follow."""
    ranks = ranking.ranks()
    return [
        {
            "module": module.name,
            "block": _block(module),
            "projection": module.projection,
            "rank": ranks[module.name],
            "place": place,
            "score": module.score,
            "error": module.standard_error,
            "parameters": module.num_parameters,
        }
        for place, module in enumerate(ranking.ordered(), start=1)
    ]


def _block(module: RankedModule) -> str:
    return "outside" if module.block_index is None else str(module.block_index)


def _block_order(module: RankedModule) -> int:
    return -1 if module.block_index is None else module.block_index
