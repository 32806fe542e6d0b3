# SPDX-License-Identifier: Apache-2.0
"""The consensus of rankings of the same modules: their mean relative rank. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from keylayers.environment import environment
from keylayers.errors import RankingError
from keylayers.files import json_sha256
from keylayers.ranking.matching import relative_ranks, scores_of
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking


def consensus(rankings: Sequence[Ranking]) -> Ranking:
    """The ranking by the mean relative rank of each module; its scores are 1 - mean.

    A relative rank is rank / number of scored modules, with average ranks for ties. Mean and
    standard error are over the rankings that score the module; the error of fewer than two is None.
    A module that no ranking scores has no score.

    Raises:
        RankingError: there is no ranking, or they are not of the same modules.
    """
    if not rankings:
        raise RankingError("a consensus must have at least one ranking, got none")
    _check_same_names(rankings)
    columns: dict[str, list[float]] = {module.name: [] for module in rankings[0].modules}
    for ranking in rankings:
        ranks = relative_ranks(scores_of(ranking))
        for module, rank in zip(ranking.modules, ranks, strict=True):
            if not math.isnan(rank):
                columns[module.name].append(float(rank))
    granularities = {ranking.granularity for ranking in rankings}
    return Ranking(
        modules=tuple(_with_mean_rank(m, columns[m.name]) for m in rankings[0].modules),
        method="consensus",
        granularity=rankings[0].granularity if len(granularities) == 1 else "module",
        provenance={
            "sources": [_source(ranking) for ranking in rankings],
            "environment": environment(),
        },
    )


def _check_same_names(rankings: Sequence[Ranking]) -> None:
    """Refuse rankings of different modules; names the first difference."""
    candidates = [{module.name for module in ranking.modules} for ranking in rankings]
    for index, names in enumerate(candidates):
        if names != candidates[0]:
            odd = sorted(names ^ candidates[0])
            raise RankingError(
                f"rankings must be of the same modules to be compared, but ranking {index + 1} and "
                f"the first differ in {len(odd)}, first {odd[0]}"
            )


def _with_mean_rank(module: RankedModule, ranks: Sequence[float]) -> RankedModule:
    """The module scored by its relative ranks."""
    from scipy.stats import sem

    return replace(
        module,
        score=1 - fmean(ranks) if ranks else None,
        standard_error=float(sem(ranks)) if len(ranks) > 1 else None,
    )


def _source(ranking: Ranking) -> dict[str, Any]:
    """A ranking of the consensus, for its record."""
    return {
        "method": ranking.method,
        "model": ranking.made_by.model.name,
        "data": ranking.made_by.data.data,
        "json_sha256": json_sha256(ranking.to_json()),
    }
