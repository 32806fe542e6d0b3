# SPDX-License-Identifier: Apache-2.0
"""Rankings as reports take them: from files, as a grid, as rows of a table. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keylayers.errors import ConfigError
from keylayers.files import distinct_ends
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.ranked_module import RankedModule, are_best
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.verification import Verification, verification_file

CHART_PACKAGES = ("altair", "vl_convert")  # of the extra `report`


def missing_for_charts() -> list[str]:
    """The packages for charts and HTML reports that are not installed."""
    return [name for name in CHART_PACKAGES if find_spec(name) is None]


@dataclass(frozen=True)
class Source:
    """A ranking and its file."""

    path: str  # as the user gave it
    label: str  # the shortest end of the path that no other path has
    ranking: Ranking
    verification: Verification | None
    is_stale: bool  # the file's verification is left out, as it belongs to an earlier ranking


def load_sources(paths: Sequence[Path]) -> list[Source]:
    """Load rankings and their verifications."""
    return [_load(path, label) for path, label in zip(paths, labels(paths), strict=True)]


def _load(path: Path, label: str) -> Source:
    ranking, file = Ranking.load(path), verification_file(path)
    found = Verification.load(file) if file.is_file() else None
    is_stale = found is not None and not found.is_of(ranking)
    return Source(str(path), label, ranking, None if is_stale else found, is_stale)


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each ranking: its folder or its file without `.json`, numbered if given twice."""
    files = [path.absolute() for path in paths]
    own = [file.parent if file.name == FILE else file for file in files]
    parts = [Path(str(path).removesuffix(".json")).parts[1:] for path in own]
    numbered = [f"{number}: {'/'.join(part)}" for number, part in enumerate(parts, start=1)]
    return distinct_ends(parts) or numbered


def num_best(ranking: Ranking, budget: WrittenBudget) -> int:
    """Number of modules in the budget. Charts can only show a selection of the best ones."""
    chosen = ranking.select(budget).modules
    if not are_best(ranking.modules, chosen):
        raise ConfigError(
            f"`budget` of a report or figure must take the best modules, as 0.3, 17 and "
            f"0.3x-params do, but {budget} goes by cost and takes others; give a number of modules"
        )
    return len(chosen)


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
