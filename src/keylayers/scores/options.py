# SPDX-License-Identifier: Apache-2.0
"""The options of each scoring method: small frozen dataclasses that check their own values.

A class for each option that methods share, and one for each method that has its own. A field's
description under `Attributes` is its help on the command line. Needs no torch.
"""

from dataclasses import dataclass
from typing import Literal

from keylayers.options import Options, at_least, between, check_above_zero, check_fraction, checked

Granularity = Literal["module", "block", "projection", "part"]

SMALLEST_ROUND = 4  # gates; a round with fewer is not split again


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """No options; the base of those that have some."""


@dataclass(frozen=True, kw_only=True)
class Grouped(MethodOptions):
    """For methods that put gates on the updates.

    Attributes:
        granularity: One gate for each module, block or projection, or for each rank-one part of the
            updates (part), which ranks what `prune` can cut and the LoRA rank of each module.
    """

    granularity: Granularity = "module"


@dataclass(frozen=True, kw_only=True)
class Batched(MethodOptions):
    """For methods that look at batches of the data.

    Attributes:
        mask_batches: Batches that the method looks at; elimination takes this many in each round.
    """

    mask_batches: int = checked(4, at_least(1))


@dataclass(frozen=True, kw_only=True)
class UntilStable(MethodOptions):
    """For methods that can stop when the selection no longer changes.

    Attributes:
        until_stable: Stop when the best share of the modules, such as 0.3, stays the same: for 10
            steps (ila, price; at most `mask_steps`), or over two more runs on other batches, whose
            scores are averaged (elimination, path; at most ten runs).
    """

    until_stable: float | None = checked(None, check_fraction)


@dataclass(frozen=True, kw_only=True)
class GroupedBatches(Batched, Grouped):
    """Options of `leave-one-out`."""


@dataclass(frozen=True, kw_only=True)
class EliminationOptions(UntilStable, GroupedBatches):
    """Options of `elimination`.

    Attributes:
        keep_fraction: Share of the modules that a round keeps for the next.
    """

    keep_fraction: float = checked(0.7, check_fraction)

    def round_sizes(self, num_gates: int) -> list[int]:
        """How many gates each round scores: all, then a share of the round before."""
        sizes = [num_gates]
        while sizes[-1] > SMALLEST_ROUND:
            sizes.append(min(sizes[-1] - 1, max(1, round(self.keep_fraction * sizes[-1]))))
        return sizes


@dataclass(frozen=True, kw_only=True)
class PathOptions(UntilStable, GroupedBatches):
    """Options of `path`.

    Attributes:
        path_points: Points of the integral from no update to all.
    """

    path_points: int = checked(4, at_least(1))


@dataclass(frozen=True, kw_only=True)
class GradientPathOptions(Batched):
    """Options of `gradient-path`; those of `path` that it has."""

    path_points: int = checked(4, at_least(1))


@dataclass(frozen=True, kw_only=True)
class ShapleyOptions(GroupedBatches):
    """Options of `shapley`.

    Attributes:
        permutations: Random orders that the values are averaged over.
    """

    permutations: int = checked(8, at_least(1))


@dataclass(frozen=True, kw_only=True)
class LearnedOptions(UntilStable, Grouped):
    """For methods that learn the scores by gradient descent.

    Attributes:
        mask_steps: Gradient steps, one batch each: on the scores, or of adalora's training.
        mask_optimizer: Plain gradient descent (sgd) or adam. We do not know the paper's choice.
        mask_learning_rate: Learning rate of the scores. Default: 10 for sgd, 0.05 for adam.
    """

    mask_steps: int = checked(60, at_least(1))
    mask_optimizer: Literal["sgd", "adam"] = "sgd"
    mask_learning_rate: float | None = checked(None, check_above_zero)

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate that is used; experiments/LOG.md has the runs behind the defaults."""
        return self.mask_learning_rate or {"sgd": 10.0, "adam": 0.05}[self.mask_optimizer]


@dataclass(frozen=True, kw_only=True)
class IlaOptions(LearnedOptions):
    """Options of `ila`.

    Attributes:
        initial_score: Score of every module at first; the gate is its sigmoid, so 1 is a gate of
            0.73.
    """

    initial_score: float = checked(  # the paper tries 4, 2 and 1 (from memory)
        1.0, between(-20.0, 20.0, ", where its gate is open or closed to float32's precision")
    )


@dataclass(frozen=True, kw_only=True)
class PriceOptions(LearnedOptions):
    """Options of `price`.

    Attributes:
        price: Price of the mean gate, in nats.
    """

    price: float = checked(2.0, between(0.0, 1e6, " nats"))


@dataclass(frozen=True, kw_only=True)
class AdaLoraOptions(MethodOptions):
    """Options of `adalora`.

    Attributes:
        mask_steps: Steps of its training; the budget falls between two of them.
    """

    mask_steps: int = checked(60, at_least(2))
