# SPDX-License-Identifier: Apache-2.0
"""A selection: the modules of a ranking that a budget buys. Needs no torch."""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.budget import GIB, Auto, Budget, Memory, Parameters, Time
from keylayers.ranking.ranked_module import RankedModule, best_first
from keylayers.ranking.record import MadeBy
from keylayers.ranking.targets import lora_targets, rank_options

if TYPE_CHECKING:
    from peft import LoraConfig


# A pass through both LoRA matrices of a square weight with N parameters is 2 r sqrt(N).
PASSES = 3  # forward, backward for activations, gradient of the matrices


class StepTime:
    """Multiply-adds for one token of a training step, trained as in the run that is recorded.

    The forward pass goes through everything, the backward pass only down to the lowest trained
    module, and a trained module adds its own gradient. Matrix products are counted, N for a pass
    through a module with N parameters; attention's own products, norms and the optimizer are not.
    `benchmarks/train_selection.py` compares the count with the clock.
    """

    def __init__(self, modules: Sequence[RankedModule], made_by: MadeBy) -> None:
        sizes = [module.num_parameters for module in modules]
        head, lora_rank = made_by.model.num_head_parameters, made_by.options.lora_rank
        is_full = made_by.options.update == "full" or made_by.tuned is not None
        self._names = [module.name for module in modules]
        self._forward = sum(sizes) + head
        from_the_head = list(accumulate(reversed(sizes), initial=head))
        self._backward = from_the_head[1:][::-1]  # down to each module, in model order
        self.own = [  # what a trained module adds for its own gradient, or for its LoRA matrices
            float(size) if is_full else PASSES * 2 * lora_rank * size**0.5 for size in sizes
        ]
        self.whole = self.of(range(len(sizes)))  # a step that trains all modules

    def share(self, names: Collection[str]) -> float:
        """A step that trains the modules of these names, as a share of `whole`."""
        return self.of([i for i, name in enumerate(self._names) if name in names]) / self.whole

    def of(self, chosen: Sequence[int]) -> float:
        """A step that trains the modules at these places in model order."""
        backward = self._backward[min(chosen)]
        return float(self._forward + backward + sum(self.own[place] for place in chosen))


@runtime_checkable
class StepMemory(Protocol):
    """What a training step holds; `keylayers.measured_memory` measures it."""

    batch: str

    def of(self, names: Collection[str]) -> float:
        """Bytes at the peak of a step that trains these modules."""


@dataclass(frozen=True)
class Selection:
    """Modules to train."""

    modules: tuple[RankedModule, ...]  # in model order
    num_candidates: int  # how many modules the ranking holds
    num_candidate_parameters: int  # their parameters together
    budget: str  # as it was written
    num_tied_out: int  # left out with the score of the last one taken; ties go by model order
    is_of_mixture: bool  # the ranking holds stacked experts, which PEFT has its own ways with
    # Module name -> its kept rank-one parts, by falling singular value, if these are ranked.
    parts: Mapping[str, Sequence[int]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return tuple(module.name for module in self.modules)

    @property
    def num_parameters(self) -> int:
        """Parameters of the selected modules' weights and biases, or of the selected parts."""
        if self.parts is None:
            return sum(module.num_parameters for module in self.modules)
        sizes = {module.name: module.part_parameters or () for module in self.modules}
        return sum(sizes[name][index] for name, kept in self.parts.items() for index in kept)

    @property
    def num_parts(self) -> int | None:
        """How many rank-one parts are selected; None if modules are."""
        return None if self.parts is None else sum(map(len, self.parts.values()))

    @property
    def ranks(self) -> dict[str, int] | None:
        """Module name -> LoRA rank, the number of its selected parts; None if these are modules."""
        if self.parts is None:
            return None
        return {
            module.name: len(self.parts[module.name]) - module.has_magnitude_part
            for module in self.modules
        }

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
        """A `peft.LoraConfig` for exactly these modules; `options` go to it as they are.

        If rank-one parts are ranked, each module gets the rank of its parts. Its alpha follows
        the rank, so that `lora_alpha / r` is the same for all.
        """
        from peft import LoraConfig

        own = {"target_modules"} | ({"r", "rank_pattern", "alpha_pattern"} if self.parts else set())
        if taken := sorted(own & options.keys()):
            raise TypeError(f"`{taken[0]}` comes from the selection; leave it out")
        if self.ranks is not None:
            alpha = options.get("lora_alpha", LoraConfig.lora_alpha)
            scaling = alpha / max(self.ranks.values())
            options |= rank_options(self.ranks, scaling, self.stacked)
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
        } | ({} if self.ranks is None else {"lora_ranks": self.ranks})


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
        taken = _within_time(modules, time, budget)
    elif isinstance(budget, Memory):
        taken = _within_memory(ordered, budget, memory)
    else:
        if isinstance(budget, Parameters):
            count = _count_within_parameters(ordered, budget)
        else:
            count = budget.num_of(len(ordered), "modules")
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


def _within_time(
    modules: Sequence[RankedModule], time: StepTime, budget: Time
) -> list[RankedModule]:
    """Modules with a high sum of scores whose step costs at most the budget.

    For each module that could be the lowest trained one, modules above it are added in the order of
    score per cost, but none with a score of zero or below. Scores should add up, as nats do.
    """
    limit = budget.fraction * time.whole
    scores = [module.score or 0.0 for module in modules]
    wanted = [place for place in range(len(modules)) if scores[place] > 0]
    best: list[int] = []
    for index, lowest in enumerate(wanted):
        total = time.of([lowest])
        if total > limit:
            continue
        chosen = [lowest]
        for place in sorted(
            wanted[index + 1 :], key=lambda place: -scores[place] / time.own[place]
        ):
            if total + time.own[place] <= limit:
                total += time.own[place]
                chosen.append(place)
        if sum(scores[place] for place in chosen) > sum(scores[place] for place in best):
            best = chosen
    if not best:
        least = min((time.of([place]) for place in wanted), default=float("nan")) / time.whole
        raise ConfigError(
            f"`budget` must allow the forward pass and one module, which is {least:.2f}x-time for "
            f"this ranking, got {budget}"
        )
    return [modules[place] for place in best]


def _within_memory(
    ordered: Sequence[RankedModule], budget: Memory, memory: StepMemory | None
) -> list[RankedModule]:
    """As many of the best modules as fit, by bisection: more modules never hold less."""
    if memory is None:
        raise ConfigError(
            f"`budget` {budget} needs a measured training step, so it is for `keylayers train` and "
            f"`memory=keylayers.measured_memory(trainer)`; to prune, give a share or a number of "
            f"modules, or rank with `granularity` part"
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
