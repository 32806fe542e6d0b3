# SPDX-License-Identifier: Apache-2.0
"""The consensus of rankings of the same modules: their mean relative rank. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import scipy  # loads `scipy.stats` when it is first used

from keylayers.environment import environment
from keylayers.errors import RankingError
from keylayers.files import json_sha256
from keylayers.ranking.matching import relative_ranks, scores_of
from keylayers.ranking.ranking import Ranking


def consensus(rankings: Sequence[Ranking]) -> Ranking:
    """The ranking by the mean relative rank of each module; its scores are 1 - mean.

    A relative rank is rank / number of scored modules, with average ranks for ties. Mean and
    standard error are over the rankings that score the module; the error of fewer than two is None.
    A module that no ranking scores has no score.
    """
    if not rankings:
        raise RankingError("a consensus must have at least one ranking, got none")
    if any(ranking.is_of_parts for ranking in rankings):
        raise RankingError(
            "a consensus must be of rankings of modules, but one is of rank-one parts, which are "
            "others in every adapter; rank with `granularity` module"
        )
    ranks: dict[str, list[float]] = {module.name: [] for module in rankings[0].modules}
    for number, ranking in enumerate(rankings, start=1):
        odd = sorted(ranks.keys() ^ {module.name for module in ranking.modules})
        if odd:
            raise RankingError(
                f"rankings must be of the same modules to be compared, but ranking {number} and "
                f"the first differ in {len(odd)}, first {odd[0]}"
            )
        relative = relative_ranks(scores_of(ranking)).tolist()
        for module, rank in zip(ranking.modules, relative, strict=True):
            if not math.isnan(rank):
                ranks[module.name].append(rank)
    granularities = {ranking.granularity for ranking in rankings}
    return Ranking(
        modules=tuple(
            replace(
                module,
                score=1 - fmean(own) if own else None,
                standard_error=float(scipy.stats.sem(own)) if len(own) > 1 else None,
            )
            for module, own in zip(rankings[0].modules, ranks.values(), strict=True)
        ),
        method="consensus",
        granularity=rankings[0].granularity if len(granularities) == 1 else "module",
        provenance={
            "sources": [
                {
                    "method": ranking.method,
                    "model": ranking.made_by.model.name,
                    "data": ranking.made_by.data.data,
                    "json_sha256": json_sha256(ranking.to_json()),
                }
                for ranking in rankings
            ],
            "environment": environment(),
        },
    )
