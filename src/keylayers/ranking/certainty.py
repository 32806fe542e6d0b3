# SPDX-License-Identifier: Apache-2.0
"""Which modules are inside or outside a selection with 95 % confidence. Needs no torch.

The cut of a budget is the midpoint between the last score taken and the first left out. A module's
place is decided if its 95 % interval, score ± 1.96 standard errors, does not contain the cut. The
interval covers the noise of the batches within a run, for a fixed cut. It does not cover other
seeds of the fine-tune, which can move scores further than batches do.
"""

from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.ranked_module import are_best
from keylayers.ranking.ranking import Ranking

NUM_STANDARD_ERRORS = 1.96  # to each side of a normal mean, for 95 %


def undecided(ranking: Ranking, budget: WrittenBudget) -> tuple[str, ...]:
    """Names of the modules, in model order, whose 95 % interval contains the budget's cut.

    Another seed of the fine-tune may move modules that are not named here. Without a cut nothing is
    undecided: if the budget takes all modules, or if no module that is left out has a score.

    Args:
        ranking: Modules without a score or a standard error are never undecided.
        budget: In any form of `keylayers.ranking.budget`.

    Returns:
        Empty if no standard error is known. If the last score taken and the first left out are
        equal, all modules with this score are named: the model's order places them, not the data.

    Raises:
        ConfigError: the budget has no known form, or buys nothing or more than there is.
        RankingError: the budget reaches modules that have no score.
    """
    known = decisions(ranking, budget)
    return tuple(name for name, is_decided in known.items() if is_decided is False)


def decisions(ranking: Ranking, budget: WrittenBudget) -> dict[str, bool | None]:
    """Module name -> whether its place is decided, in model order; None where it is not known.

    No place is known for a budget by cost, which takes no module for its score alone.

    Raises:
        ConfigError: the budget has no known form, or buys nothing or more than there is.
        RankingError: the budget reaches modules that have no score.
    """
    chosen = ranking.select(budget).modules
    if not are_best(ranking.modules, chosen):
        return {module.name: None for module in ranking.modules}
    cut = _cut(ranking, len(chosen))
    known: dict[str, bool | None] = {}
    for module in ranking.modules:
        if module.score is None or module.standard_error is None:
            known[module.name] = None
        else:
            reach = NUM_STANDARD_ERRORS * module.standard_error
            known[module.name] = cut is None or abs(module.score - cut) > reach
    return known


def _cut(ranking: Ranking, count: int) -> float | None:
    """Midpoint of the last score taken and the first left out; None without one of the two."""
    ordered = ranking.ordered()
    taken = ordered[count - 1].score
    left_out = ordered[count].score if count < len(ordered) else None
    return None if taken is None or left_out is None else (taken + left_out) / 2
