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
    """Names of the modules, in model order, whose 95 % interval contains the budget's cut."""
    known = decisions(ranking, budget)
    return tuple(name for name, is_decided in known.items() if is_decided is False)


def decisions(ranking: Ranking, budget: WrittenBudget) -> dict[str, bool | None]:
    """Module name -> whether its place is decided, in model order; None where it is not known.

    Without a cut every place is decided: if the budget takes all modules, or if no module that is
    left out has a score. A budget by cost decides none, as it takes no module for its score alone.
    """
    chosen = ranking.select(budget).modules
    known: dict[str, bool | None] = {module.name: None for module in ranking.modules}
    if not are_best(ranking.modules, chosen):
        return known
    ordered = ranking.ordered()
    taken = ordered[len(chosen) - 1].score
    left_out = ordered[len(chosen)].score if len(chosen) < len(ordered) else None
    cut = None if taken is None or left_out is None else (taken + left_out) / 2
    for module in ranking.modules:
        if module.score is not None and module.standard_error is not None:
            reach = NUM_STANDARD_ERRORS * module.standard_error
            known[module.name] = cut is None or abs(module.score - cut) > reach
    return known
