# SPDX-License-Identifier: Apache-2.0
"""What a training step costs when only some modules are trained, by counting. Needs no torch.

The forward pass goes through everything, the backward pass only down to the lowest trained module,
and a trained module adds its own gradient. Counted are the multiply-adds of matrix products for one
token: N for a pass through a module of N parameters. Not counted: attention's own products, norms,
the optimiser. `benchmarks/train_selection.py` holds the count against the clock.
"""

from collections.abc import Collection, Sequence

from keylayers.errors import ConfigError
from keylayers.ranking import RankedModule, Ranking

# A pass through LoRA's two matrices, of a square matrix with so many parameters: 2 r sqrt(N).
PASSES = 3  # forward, backward for activations, gradient of the matrices


def step_cost(ranking: Ranking, names: Collection[str]) -> float:
    """The cost of a step that trains `names`, as a share of that of training all ranked modules."""
    counts = _Counts(ranking)
    chosen = [place for place, one in enumerate(ranking.modules) if one.name in names]
    return counts.of(chosen) / counts.of(range(len(ranking.modules)))


def best_within(ranking: Ranking, fraction: float) -> tuple[RankedModule, ...]:
    """The modules with the highest sum of scores whose step costs at most so much, in model order.

    For each module that could be the lowest trained one, the others above it are taken by score
    for their own cost; a module with a score of zero or below is worth no cost.

    Args:
        ranking: Scores that add up, such as those in nats; of others the sum is a rough guide.
        fraction: Highest cost, as a share of that of training all.

    Raises:
        ConfigError: no module with a positive score can be had for so little; says the least.
    """
    counts = _Counts(ranking)
    modules = ranking.modules
    price = fraction * counts.of(range(len(modules)))
    scores = [0.0 if one.score is None else one.score for one in modules]
    wanted = [place for place, score in enumerate(scores) if score > 0]
    by_worth = sorted(wanted, key=lambda place: -scores[place] / counts.own[place])
    best: list[int] = []
    for lowest in wanted:
        rest = price - counts.of([lowest])
        if rest < 0:
            continue
        chosen = [lowest]
        for place in by_worth:
            if place > lowest and counts.own[place] <= rest:
                chosen.append(place)
                rest -= counts.own[place]
        if sum(scores[place] for place in chosen) > sum(scores[place] for place in best):
            best = chosen
    if not best:
        least = min((counts.of([place]) for place in wanted), default=float("nan"))
        raise ConfigError(
            f"`budget` must allow the forward pass and one module, which is "
            f"{least / counts.of(range(len(modules))):.2f}x-time for this ranking, got "
            f"{fraction:g}x-time"
        )
    return tuple(modules[place] for place in sorted(best))


class _Counts:
    """Multiply-adds for one token of the parts of a step."""

    def __init__(self, ranking: Ranking) -> None:
        made_by = ranking.provenance
        options = made_by.get("options", {})
        is_full = options.get("update") == "full" or "tuned" in made_by
        lora_rank = int(options.get("lora_rank", 16))
        sizes = [one.num_parameters for one in ranking.modules]
        self.own = [size if is_full else PASSES * 2 * lora_rank * size**0.5 for size in sizes]
        self._head = int(made_by.get("model", {}).get("num_head_parameters", 0))
        self._forward = sum(sizes) + self._head
        self._above = [0] * (len(sizes) + 1)
        for place in reversed(range(len(sizes))):
            self._above[place] = self._above[place + 1] + sizes[place]

    def of(self, chosen: Sequence[int]) -> float:
        """Of a step that trains the modules at these places in model order."""
        backward = self._above[min(chosen)] + self._head
        return float(self._forward + backward + sum(self.own[place] for place in chosen))
