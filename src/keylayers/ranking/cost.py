# SPDX-License-Identifier: Apache-2.0
"""What training a set of modules costs in time, and the best set for a price. Needs no torch.

The forward pass goes through everything, the backward pass only down to the lowest trained module,
and a trained module adds its own gradient. `StepTime` counts the multiply-adds of matrix products
for one token: N for a pass through a module with N parameters. Not counted: attention's own
products, norms, the optimizer. `benchmarks/train_selection.py` compares the count with the clock.
"""

from collections.abc import Collection, Sequence

from keylayers.errors import ConfigError
from keylayers.ranking.ranked_module import RankedModule

# A pass through both LoRA matrices of a square weight with N parameters is 2 r sqrt(N).
PASSES = 3  # forward, backward for activations, gradient of the matrices


class StepTime:
    """Multiply-adds of a training step for one token.

    Args:
        modules: All candidates, in model order.
        is_full: The weights themselves are trained, not LoRA matrices.
        lora_rank: Rank of the LoRA matrices.
        num_head_parameters: Parameters of the language model head.
    """

    def __init__(
        self,
        modules: Sequence[RankedModule],
        *,
        is_full: bool = False,
        lora_rank: int = 16,
        num_head_parameters: int = 0,
    ) -> None:
        self._names = [module.name for module in modules]
        sizes = [module.num_parameters for module in modules]
        self.own = [
            float(size) if is_full else PASSES * 2 * lora_rank * size**0.5 for size in sizes
        ]
        self._head = num_head_parameters
        self._forward = sum(sizes) + self._head
        self._above = [0] * (len(sizes) + 1)
        for place in reversed(range(len(sizes))):
            self._above[place] = self._above[place + 1] + sizes[place]

    def share(self, names: Collection[str]) -> float:
        """The cost of a step that trains `names`, as a share of that of training all."""
        chosen = [place for place, name in enumerate(self._names) if name in names]
        return self.of(chosen) / self.whole

    @property
    def whole(self) -> float:
        """Of a step that trains all."""
        return self.of(range(len(self.own)))

    def of(self, chosen: Sequence[int]) -> float:
        """Of a step that trains the modules at these places in model order."""
        backward = self._above[min(chosen)] + self._head
        return float(self._forward + backward + sum(self.own[place] for place in chosen))


def best_within_time(
    modules: Sequence[RankedModule], time: StepTime, fraction: float
) -> tuple[RankedModule, ...]:
    """Modules with a high sum of scores whose step costs at most so much, in model order.

    For each module that could be the lowest trained one, modules above it are added in the order of
    score per cost. Modules with a score of zero or below are never taken.

    Args:
        modules: All candidates, in model order. Scores should add up, as those in nats do.
        time: What a step costs.
        fraction: Highest cost, as a share of that of training all.

    Raises:
        ConfigError: no module with a positive score costs so little; names the least cost.
    """
    limit = fraction * time.whole
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
            f"this ranking, got {fraction:g}x-time"
        )
    return tuple(modules[place] for place in sorted(best))
