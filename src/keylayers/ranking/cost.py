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
from keylayers.ranking.ranking import RankedModule, Ranking

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


def step_cost(ranking: Ranking, names: Collection[str]) -> float:
    """The cost of a step that trains `names`, as a share of that of training all ranked modules."""
    counts = StepTime(ranking)
    chosen = [place for place, one in enumerate(ranking.modules) if one.name in names]
    return counts.of(chosen) / counts.whole


def best_within_time(ranking: Ranking, fraction: float) -> tuple[RankedModule, ...]:
    """The modules with the highest sum of scores whose step costs at most so much, in model order.

    Args:
        ranking: Scores that add up, such as those in nats; of others the sum is a rough guide.
        fraction: Highest cost, as a share of that of training all.

    Raises:
        ConfigError: no module with a positive score can be had for so little; says the least.
    """
    counts = StepTime(ranking)
    best = best_within(ranking, counts, fraction * counts.whole)
    if not best:
        least = least_price(ranking, counts) / counts.whole
        raise ConfigError(
            f"`budget` must allow the forward pass and one module, which is {least:.2f}x-time for "
            f"this ranking, got {fraction:g}x-time"
        )
    return best


def best_within(ranking: Ranking, price: Price, limit: float) -> tuple[RankedModule, ...]:
    """The modules with the highest sum of scores for at most `limit`, in model order; () if none.

    For each module that could be the lowest trained one, the others above it are taken by score
    for their own cost; a module with a score of zero or below is worth no cost.
    """
    scores = [one.score or 0.0 for one in ranking.modules]
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
    return tuple(ranking.modules[place] for place in sorted(best))


def least_price(ranking: Ranking, price: Price) -> float:
    """The price of the cheapest single module that is worth something; NaN if none is."""
    wanted = (place for place in price.order if (ranking.modules[place].score or 0.0) > 0)
    return min((price.bill(place).total for place in wanted), default=float("nan"))


class StepTime:
    """Multiply-adds for one token of the parts of a step."""

    def __init__(self, ranking: Ranking) -> None:
        made_by = ranking.provenance
        options = made_by.get("options", {})
        is_full = options.get("update") == "full" or "tuned" in made_by
        lora_rank = int(options.get("lora_rank", 16))
        sizes = [one.num_parameters for one in ranking.modules]
        self.own = [
            float(size) if is_full else PASSES * 2 * lora_rank * size**0.5 for size in sizes
        ]
        self.order = range(len(sizes))
        self._head = int(made_by.get("model", {}).get("num_head_parameters", 0))
        self._forward = sum(sizes) + self._head
        self._above = [0] * (len(sizes) + 1)
        for place in reversed(self.order):
            self._above[place] = self._above[place + 1] + sizes[place]

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
