# SPDX-License-Identifier: Apache-2.0
"""A selection: the modules of a ranking that a budget buys. Needs no torch."""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.budget import GIB, Auto, Budget, Memory, Parameters, Time
from keylayers.ranking.cost import StepTime, best_within_time
from keylayers.ranking.ranked_module import RankedModule, best_first
from keylayers.ranking.targets import lora_targets

if TYPE_CHECKING:
    from peft import LoraConfig


@runtime_checkable
class StepMemory(Protocol):
    """What a training step holds; `keylayers.measured_memory` measures it."""

    batch: str

    def of(self, names: Collection[str]) -> float:
        """Bytes at the peak of a step that trains these modules."""


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
    num_tied_out: int
    is_of_mixture: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return tuple(module.name for module in self.modules)

    @property
    def num_parameters(self) -> int:
        """Parameters of the selected modules' own weights and biases."""
        return sum(module.num_parameters for module in self.modules)

    @property
    def stacked(self) -> set[str] | None:
        """Names of the selected stacked experts; None if the ranking holds none at all."""
        if not self.is_of_mixture:
            return None
        return {module.name for module in self.modules if module.is_stacked}

    @property
    def lora_targets(self) -> dict[str, Any]:
        """The fields of a PEFT config that put LoRA on exactly these modules."""
        return lora_targets(self.names, self.stacked)

    def lora_config(self, **options: Any) -> "LoraConfig":
        """A `peft.LoraConfig` for exactly these modules; `options` go to it as they are."""
        from peft import LoraConfig

        if "target_modules" in options:
            raise TypeError("`target_modules` comes from the selection; leave it out")
        return LoraConfig(**{"task_type": "CAUSAL_LM", **options}, **self.lora_targets)

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


def select(
    modules: Sequence[RankedModule], budget: Budget, time: StepTime, memory: StepMemory | None
) -> Selection:
    """The best modules that `budget` buys, as `Ranking.select` describes."""
    if isinstance(budget, Auto):
        raise ConfigError(
            "`budget` auto is for `keylayers train`, `prune` and `export`; run `keylayers verify` "
            "and give the number of modules that it recommends"
        )
    if memory is not None and not isinstance(budget, Memory):
        raise ConfigError(
            f"`memory` must be left out with `budget` {budget}; it is for budgets such as 12GiB"
        )
    ordered, num_tied_out = best_first(modules), 0
    if isinstance(budget, Time):
        taken = best_within_time(modules, time, budget)
    elif isinstance(budget, Memory):
        taken = _within_memory(ordered, budget, memory)
    else:
        if isinstance(budget, Parameters):
            count = _count_within_parameters(ordered, budget)
        else:
            count = budget.num_modules(len(ordered))
        taken, worst = ordered[:count], ordered[count - 1].score
        if worst is None:
            num_scored = sum(module.score is not None for module in ordered)
            raise RankingError(
                f"the budget must stay within the modules that have a score, but it takes {count} "
                f"and only {num_scored} have one; lower the budget"
            )
        num_tied_out = sum(module.score == worst for module in ordered[count:])
    names = {module.name for module in taken}
    return Selection(
        modules=tuple(module for module in modules if module.name in names),
        num_candidates=len(modules),
        num_candidate_parameters=sum(module.num_parameters for module in modules),
        budget=str(budget),
        num_tied_out=num_tied_out,
        is_of_mixture=any(module.is_stacked for module in modules),
    )


def _count_within_parameters(ordered: Sequence[RankedModule], budget: Parameters) -> int:
    sizes = [module.num_parameters for module in ordered]
    allowed = budget.fraction * sum(sizes)
    count = bisect_right(list(accumulate(sizes)), allowed * (1 + 1e-12))
    if count == 0:
        raise ConfigError(
            f"`budget` must allow at least the best module, {ordered[0].name} with "
            f"{sizes[0]:,} parameters, but {budget} allows {int(allowed):,}"
        )
    return count


def _within_memory(
    ordered: Sequence[RankedModule], budget: Memory, memory: StepMemory | None
) -> list[RankedModule]:
    """As many of the best modules as fit, by bisection: more modules never hold less."""
    if memory is None:
        raise ConfigError(
            f"`budget` {budget} needs a measured training step: use it with `keylayers train`, or "
            f"give memory=keylayers.measured_memory(trainer)"
        )
    scored = [module for module in ordered if module.score is not None]

    def held(count: int) -> float:
        return memory.of([module.name for module in scored[:count]])

    count = bisect_right(range(1, len(scored) + 1), budget.num_bytes, key=held)
    if count == 0:
        raise ConfigError(
            f"`budget` must allow a step of the best module, which holds {held(1) / GIB:.3g}GiB "
            f"with batches of {memory.batch}, got {budget}; lower `batch_size` or `max_length`, or "
            f"use `gradient_checkpointing`"
        )
    return scored[:count]


def check_same_modules(ranked: Sequence[RankedModule], sizes: Mapping[str, int]) -> None:
    """Refuse a ranking of another model, whose modules have these numbers of parameters by name."""
    wrong = [
        f"{module.name} ({module.num_parameters:,} parameters in the ranking, "
        f"{f'{sizes[module.name]:,}' if module.name in sizes else 'none'} in the model)"
        for module in ranked
        if sizes.get(module.name) != module.num_parameters
    ]
    if wrong:
        raise RankingError(
            f"the ranking must be of this model, but {len(wrong)} of {len(ranked)} "
            f"modules differ, first {'; '.join(wrong[:3])}"
        )
