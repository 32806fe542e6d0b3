# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's own importance beside a ranking of its adapter. Needs no torch."""

from dataclasses import replace

from keylayers.errors import RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking


def ranks_left(ranking: Ranking) -> dict[str, int]:
    """Module name -> the LoRA rank that AdaLoRA left it; empty for other updates."""
    found = ranking.made_by.adalora_ranks_left
    return {module.name: found[module.name] for module in ranking.modules if module.name in found}


def adalora_line(ranking: Ranking, budget: WrittenBudget) -> str | None:
    """How far the ranking and AdaLoRA's own allocation agree, for a person; None without one."""
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
