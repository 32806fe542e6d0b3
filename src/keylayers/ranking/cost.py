# SPDX-License-Identifier: Apache-2.0
"""What training a set of modules costs in time, and the best set for a price. Needs no torch.

The forward pass goes through everything, the backward pass only down to the lowest trained module,
and a trained module adds its own gradient. `StepTime` counts the multiply-adds of matrix products
for one token: N for a pass through a module with N parameters. Not counted: attention's own
products, norms, the optimizer. `benchmarks/train_selection.py` compares the count with the clock.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate

from keylayers.errors import ConfigError
from keylayers.ranking.budget import Time
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.record import MadeBy

# A pass through both LoRA matrices of a square weight with N parameters is 2 r sqrt(N).
PASSES = 3  # forward, backward for activations, gradient of the matrices


class StepTime:
    """Multiply-adds for one token of a training step, trained as in the run that is recorded."""

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


def best_within_time(
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
