# SPDX-License-Identifier: Apache-2.0
"""A ranking as a data frame and as charts, for notebooks and scripts. Needs no torch."""

from typing import TYPE_CHECKING

import pandas as pd

from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.certainty import decisions
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.verification import Verification
from keylayers.report.source import Source, missing_for_charts, module_rows

if TYPE_CHECKING:
    from keylayers.report.charts import Chart
    from keylayers.report.figures import FigureKind


def ranking_table(ranking: Ranking, budget: WrittenBudget = 0.3) -> pd.DataFrame:
    """One row per module, best first.

    The columns are `rank`, `module`, `block`, `projection`, `score`, `error` (the standard error),
    `parameters`, `selected` (by the budget) and `decided`: whether the module is inside or outside
    the selection with 95 % confidence, None where this is not known. Of rank-one parts, `lora_rank`
    (the number of kept parts) is there instead of `decided`.

    Raises:
        ConfigError: the budget has no known form, or buys nothing.
        RankingError: the budget reaches modules that have no score.
    """
    table = pd.DataFrame(module_rows(ranking)).drop(columns="place")
    selection = ranking.select(budget)
    table["rank"] = table["rank"].astype("Int64")  # an integer also where a module has none
    table["selected"] = table["module"].isin(selection.names)
    if selection.ranks is None:
        table["decided"] = table["module"].map(decisions(ranking, budget)).astype("boolean")
    else:
        table["lora_rank"] = [selection.ranks.get(name, 0) for name in table["module"]]
    first = ["rank", "module"]
    return table[first + [name for name in table if name not in first]]


def ranking_chart(ranking: Ranking, budget: WrittenBudget = 0.3) -> "Chart":
    """An Altair heatmap of blocks by projections; needs keylayers[report].

    It shows the rank of each module and fills those in the budget. If rank-one parts are ranked, it
    shows the LoRA rank that each module gets.
    """
    return _chart("heatmap", ranking, None, budget)


def curve_chart(ranking: Ranking, found: Verification, budget: WrittenBudget = 0.3) -> "Chart":
    """An Altair chart of the mask curve and its controls; needs keylayers[report].

    `found` is the verification of this ranking, from `verify_ranking` or `keylayers verify`.
    """
    if not found.is_of(ranking):
        raise RankingError(
            "the verification must belong to the ranking, but it is of another one; verify this "
            "ranking"
        )
    return _chart("curve", ranking, found, budget)


def _chart(
    kind: "FigureKind", ranking: Ranking, found: Verification | None, budget: WrittenBudget
) -> "Chart":
    if missing := missing_for_charts():
        raise ConfigError(
            f"charts need {', '.join(missing)}, which is not installed; "
            f"`pip install 'keylayers[report]'`"
        )
    from keylayers.report.figures import single_chart

    return single_chart(kind, Source("", "", ranking, found, is_stale=False), budget)
