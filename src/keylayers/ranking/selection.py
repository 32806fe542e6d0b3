# SPDX-License-Identifier: Apache-2.0
"""A selection: the modules of a ranking that a budget buys. Needs no torch.

Forms of a budget:

| written | in Python | means |
|---|---|---|
| `0.3` | `0.3` | 30 % of the modules, rounded to the nearest count, a half up |
| `17` | `17` | the best 17 modules |
| `0.3x-params` | `"0.3x-params"` | best modules with at most 30 % of all modules' parameters |
| `0.6x-time` | `"0.6x-time"` | highest sum of scores whose training step costs at most 60 % |
| `12GiB` | `"12GiB"`, with `memory` | highest sum of scores whose training step fits |
| `--freeze 0.25` | `Freeze(0.25)` | all but the worst 25 % |
| `auto` | `verify(...).recommendation.num_modules` | fewest modules nearly as good as all |

A number with a decimal point is a fraction, without one a count: `1.0` is all modules, `1` is one
module.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.cost import best_within_time
from keylayers.ranking.memory import StepMemory, best_within_memory, is_memory, parse_memory
from keylayers.ranking.ranking import RankedModule, Ranking

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Freeze:
    """All modules but the worst `fraction` of them."""

    fraction: float

    def num_kept(self, num_modules: int) -> int:
        """How many of `num_modules` are left; at least one."""
        return max(1, num_modules - _rounded(self.fraction * num_modules))


Budget = float | int | str | Freeze

AUTO = "auto"
_PARAMS = re.compile(r"(.+)x-params")
_TIME = re.compile(r"(.+)x-time")
_FORMS = (
    "a fraction such as 0.3, a count such as 17, a fraction of parameters such as 0.3x-params or "
    "of the cost of a training step such as 0.6x-time, or memory such as 12GiB"
)


@dataclass(frozen=True)
class Selection:
    """Modules to train.

    Attributes:
        modules: The selected modules, in model order.
        num_candidates: How many modules the ranking holds.
        num_candidate_parameters: Their parameters together.
        budget: The budget as it was written.
        num_tied_out: Modules left out with the same score as the last one taken; ties go by model
            order.
        is_of_mixture: The ranking holds stacked experts, which PEFT has its own ways with.
    """

    modules: tuple[RankedModule, ...]
    num_candidates: int
    num_candidate_parameters: int
    budget: str
    num_tied_out: int = 0
    is_of_mixture: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return tuple(module.name for module in self.modules)

    @property
    def num_parameters(self) -> int:
        """Parameters of the selected modules' own weights and biases."""
        return sum(module.num_parameters for module in self.modules)

    def lora_config(self, **options: Any) -> "LoraConfig":
        """A `peft.LoraConfig` for exactly these modules; `options` go to it as they are."""
        from keylayers.apply.adapter import lora_config

        if not self.is_of_mixture:
            return lora_config(self.names, **options)
        stacked = {module.name for module in self.modules if module.is_stacked}
        return lora_config(self.names, stacked=stacked, **options)

    def record(self) -> dict[str, Any]:
        """The selection for a run record, JSON-able."""
        return {
            "budget": self.budget,
            "modules": list(self.names),
            "num_modules": len(self.modules),
            "num_candidates": self.num_candidates,
            "num_parameters": self.num_parameters,
            "num_candidate_parameters": self.num_candidate_parameters,
            "num_tied_out": self.num_tied_out,
        }


def select(ranking: Ranking, budget: Budget, memory: StepMemory | None = None) -> Selection:
    """The best modules that `budget` buys.

    Args:
        ranking: The modules with their scores.
        budget: How much; the forms are above.
        memory: What a training step holds (`keylayers.measured_memory`), for a budget in GiB.

    Raises:
        ConfigError: the budget has no known form, or buys nothing or more than there is; it is in
            GiB and `memory` is missing, or the other way round.
        RankingError: the budget reaches modules that have no score.
    """
    ordered = ranking.ordered()
    if isinstance(budget, str):
        budget = parse_budget(budget)
    if is_memory(budget) != (memory is not None):
        raise ConfigError(
            f"`budget` {budget} needs a measured training step: use it with `keylayers train`, or "
            f"give memory=keylayers.measured_memory(trainer)"
            if memory is None
            else f"`memory` must be left out with `budget` {budget}; it is for budgets such as "
            f"12GiB"
        )
    if isinstance(budget, str) and memory is not None:
        return _selection(ranking, best_within_memory(ranking, memory, budget), budget)
    if isinstance(budget, str) and _TIME.fullmatch(budget):
        return _selection(ranking, best_within_time(ranking, _fraction_of_time(budget)), budget)
    count = _count(ordered, budget)
    taken, left = ordered[:count], ordered[count:]
    if taken[-1].score is None:
        num_scored = sum(module.score is not None for module in ordered)
        raise RankingError(
            f"the budget must stay within the modules that have a score, but it takes {count} and "
            f"only {num_scored} have one; lower the budget"
        )
    num_tied_out = sum(module.score == taken[-1].score for module in left)
    return _selection(ranking, taken, budget, num_tied_out)


def _selection(
    ranking: Ranking, taken: Sequence[RankedModule], budget: Budget, num_tied_out: int = 0
) -> Selection:
    written = f"all but the worst {budget.fraction}" if isinstance(budget, Freeze) else str(budget)
    names = {module.name for module in taken}
    return Selection(
        modules=tuple(module for module in ranking.modules if module.name in names),
        num_candidates=len(ranking.modules),
        num_candidate_parameters=sum(module.num_parameters for module in ranking.modules),
        budget=written,
        num_tied_out=num_tied_out,
        is_of_mixture=any(module.is_stacked for module in ranking.modules),
    )


def are_best(ranking: Ranking, names: Collection[str]) -> bool:
    """Whether `names` are the best so many modules; of a budget by cost they may be others."""
    return set(names) == {module.name for module in ranking.ordered()[: len(names)]}


def parse_budget(text: str) -> Budget:
    """The budget that `text` writes; `0.3x-params`, `0.6x-time` and `12GiB` stay text.

    Raises:
        ConfigError: it has none of the known forms, or a fraction that cannot be.
    """
    if text == AUTO:
        raise ConfigError(
            "`budget` auto is for `keylayers train` and `prune`; run `keylayers verify` and give "
            "the number of modules that it recommends"
        )
    if is_memory(text):
        parse_memory(text)
        return text
    if _PARAMS.fullmatch(text):
        _fraction_of_parameters(text)
        return text
    if _TIME.fullmatch(text):
        _fraction_of_time(text)
        return text
    try:
        return int(text)
    except ValueError:
        pass
    try:
        fraction = float(text)
    except ValueError:
        raise ConfigError(f"`budget` must be {_FORMS}, got {text!r}") from None
    _check_fraction(fraction)
    return fraction


def _count(ordered: Sequence[RankedModule], budget: Budget) -> int:
    """How many modules of `ordered` the budget buys."""
    num_modules = len(ordered)
    if isinstance(budget, Freeze):
        if not 0 < budget.fraction < 1:
            raise ConfigError(f"`freeze` must be above 0 and below 1, got {budget.fraction}")
        return budget.num_kept(num_modules)
    if isinstance(budget, str):
        return _count_within_parameters(ordered, budget)
    if isinstance(budget, int):
        if not 1 <= budget <= num_modules:
            raise ConfigError(
                f"`budget` as a count must be between 1 and {num_modules}, the ranking's modules, "
                f"got {budget}; a fraction needs a decimal point"
            )
        return budget
    _check_fraction(budget)
    return max(1, _rounded(budget * num_modules))


def _count_within_parameters(ordered: Sequence[RankedModule], budget: str) -> int:
    allowed = _fraction_of_parameters(budget) * sum(module.num_parameters for module in ordered)
    count = total = 0
    for module in ordered:
        total += module.num_parameters
        if total > allowed * (1 + 1e-12):
            break
        count += 1
    if count == 0:
        raise ConfigError(
            f"`budget` must allow at least the best module, {ordered[0].name} with "
            f"{ordered[0].num_parameters:,} parameters, but {budget} allows {int(allowed):,}"
        )
    return count


def _check_fraction(budget: float) -> None:
    if not 0 < budget <= 1:
        raise ConfigError(f"`budget` as a fraction must be above 0 and at most 1, got {budget}")


def _fraction_of_parameters(budget: str) -> float:
    return _fraction(budget, _PARAMS, "of parameters", "x-params")


def _fraction_of_time(budget: str) -> float:
    return _fraction(budget, _TIME, "of the cost of a step", "x-time")


def _fraction(budget: str, form: re.Pattern[str], of_what: str, unit: str) -> float:
    """The fraction in a budget of one form."""
    match = form.fullmatch(budget)
    try:
        fraction = float(match[1]) if match else math.nan
    except ValueError:
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise ConfigError(
            f"`budget` as a fraction {of_what} must be above 0{unit} and at most 1{unit}, got "
            f"{budget!r}"
        )
    return fraction


def _rounded(value: float) -> int:
    """To the nearest integer, a half up."""
    return math.floor(value + 0.5)


def check_same_modules(ranking: Ranking, modules: Mapping[str, int]) -> None:
    """Refuse a ranking of another model.

    Args:
        ranking: The ranking to be used.
        modules: Module name -> number of parameters, of the model at hand.

    Raises:
        RankingError: a ranked module is missing in the model or has another size; names the first
            ones.
    """
    wrong = [
        f"{module.name} ({module.num_parameters:,} parameters in the ranking, "
        f"{f'{modules[module.name]:,}' if module.name in modules else 'none'} in the model)"
        for module in ranking.modules
        if modules.get(module.name) != module.num_parameters
    ]
    if wrong:
        raise RankingError(
            f"the ranking must be of this model, but {len(wrong)} of {len(ranking.modules)} "
            f"modules differ, first {'; '.join(wrong[:3])}"
        )
