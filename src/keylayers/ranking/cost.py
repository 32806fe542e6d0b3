# SPDX-License-Identifier: Apache-2.0
"""What a set of trained modules costs, and the best set for a price. Needs no torch.

The forward pass goes through everything, the backward pass only down to the lowest trained module,
and a trained module adds its own gradient. `StepTime` counts the multiply-adds of matrix products
for one token: N for a pass through a module of N parameters. Not counted: attention's own products,
norms, the optimiser. `benchmarks/train_selection.py` holds the count against the clock.
`keylayers.ranking.memory` has the price in bytes.
"""

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from keylayers.errors import ConfigError
from keylayers.ranking.ranked_module import RankedModule

# A pass through LoRA's two matrices, of a square matrix with so many parameters: 2 r sqrt(N).
PASSES = 3  # forward, backward for activations, gradient of the matrices


@runtime_checkable
class Bill(Protocol):
    """What one set of modules costs, while modules are added to it."""

    @property
    def total(self) -> float:
        """Of the set as it is."""

    def extra(self, place: int) -> float:
        """What the module at this place of the ranking would add."""

    def add(self, place: int) -> None:
        """Take that module too; it must not lie below the first one."""


@runtime_checkable
class Price(Protocol):
    """What sets of modules cost. Modules go by their place in the ranking."""

    @property
    def order(self) -> Sequence[int]:
        """All places as a forward pass meets them."""

    def bill(self, lowest: int) -> Bill:
        """Of a set whose lowest module is this one, so far alone."""


def best_within_time(
    modules: Sequence[RankedModule], time: "StepTime", fraction: float
) -> tuple[RankedModule, ...]:
    """The modules with the highest sum of scores whose step costs at most so much, in model order.

    Args:
        modules: Their scores should add up, as those in nats do; otherwise the sum is a rough
            guide.
        time: What a step costs.
        fraction: Highest cost, as a share of that of training all.

    Raises:
        ConfigError: no module with a positive score can be had for so little; says the least.
    """
    best = best_within(modules, time, fraction * time.whole)
    if not best:
        least = least_price(modules, time) / time.whole
        raise ConfigError(
            f"`budget` must allow the forward pass and one module, which is {least:.2f}x-time for "
            f"this ranking, got {fraction:g}x-time"
        )
    return best


def best_within(
    modules: Sequence[RankedModule], price: Price, limit: float
) -> tuple[RankedModule, ...]:
    """The modules with the highest sum of scores for at most `limit`, in model order; () if none.

    For each module that could be the lowest trained one, the others above it are taken by score
    for their own cost; a module with a score of zero or below is worth no cost.
    """
    scores = [module.score or 0.0 for module in modules]
    wanted = [place for place in price.order if scores[place] > 0]
    best: list[int] = []
    for index, lowest in enumerate(wanted):
        bill = price.bill(lowest)
        if bill.total > limit:
            continue
        chosen = [lowest]
        above = {place: scores[place] / bill.extra(place) for place in wanted[index + 1 :]}
        for place in sorted(above, key=lambda place: -above[place]):
            if bill.total + bill.extra(place) <= limit:
                bill.add(place)
                chosen.append(place)
        if sum(scores[place] for place in chosen) > sum(scores[place] for place in best):
            best = chosen
    return tuple(modules[place] for place in sorted(best))


def least_price(modules: Sequence[RankedModule], price: Price) -> float:
    """The price of the cheapest single module that is worth something; NaN if none is."""
    wanted = (place for place in price.order if (modules[place].score or 0.0) > 0)
    return min((price.bill(place).total for place in wanted), default=float("nan"))


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
        self.order = range(len(sizes))
        self._head = num_head_parameters
        self._forward = sum(sizes) + self._head
        self._above = [0] * (len(sizes) + 1)
        for place in reversed(self.order):
            self._above[place] = self._above[place + 1] + sizes[place]

    def share(self, names: Collection[str]) -> float:
        """The cost of a step that trains `names`, as a share of that of training all."""
        chosen = [place for place, name in enumerate(self._names) if name in names]
        return self.of(chosen) / self.whole

    @property
    def forward(self) -> float:
        """Of a forward pass."""
        return float(self._forward)

    @property
    def whole(self) -> float:
        """Of a step that trains all."""
        return self.of(self.order)

    def of(self, chosen: Sequence[int]) -> float:
        """Of a step that trains the modules at these places in model order."""
        backward = self._above[min(chosen)] + self._head
        return float(self._forward + backward + sum(self.own[place] for place in chosen))

    def bill(self, lowest: int) -> "_TimeBill":
        """Of a set whose lowest module is this one, so far alone."""
        return _TimeBill(self.own, self.of([lowest]))


class _TimeBill:
    """A sum."""

    def __init__(self, own: Sequence[float], total: float) -> None:
        self._own = own
        self.total = total

    def extra(self, place: int) -> float:
        return self._own[place]

    def add(self, place: int) -> None:
        self.total += self._own[place]
