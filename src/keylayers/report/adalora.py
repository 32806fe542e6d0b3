# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's own allocation of ranks, compared with the ranking of its adapter."""

from dataclasses import replace

from keylayers.errors import RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking


def ranks_left(ranking: Ranking) -> dict[str, int]:
    """Module name -> the LoRA rank that AdaLoRA gave it; empty for other updates."""
    found = ranking.made_by.adalora_ranks_left
    return {module.name: found[module.name] for module in ranking.modules if module.name in found}


def adalora_line(ranking: Ranking, budget: WrittenBudget) -> str | None:
    """A sentence on how far ranking and AdaLoRA's allocation agree; None without an allocation."""
    ranks = ranks_left(ranking)
    if len(ranks) < len(ranking.modules):
        return None
    own = replace(
        ranking,
        method="adalora",
        modules=tuple(
            replace(module, score=float(ranks[module.name]), standard_error=None)
            for module in ranking.modules
        ),
    )
    try:
        found = agreement([ranking, own], budget)[0]
    except RankingError:
        return None
    tau = "none" if found.tau is None else f"{found.tau:.2f}"
    return (
        f"AdaLoRA's own budget (last column) agrees with the scores by tau-b {tau}, Jaccard "
        f"{found.jaccard:.2f} at budget {budget} (chance {found.chance_jaccard:.2f})"
    )
