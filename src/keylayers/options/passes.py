# SPDX-License-Identifier: Apache-2.0
"""How many steps a method takes to score so many gates, by its options. Needs no torch."""

from keylayers.options.choices import Method
from keylayers.options.scoring import MaskOptions

SMALLEST_ROUND = 4  # gates; fewer are not split again
READS_BATCHES_ONCE: tuple[Method, ...] = (
    "gradient-norm",
    "fisher",
    "aletheia",
    "lora-drop",
    "plop",
    "block-influence",
    "cka",
)
STOPS_BY_ITSELF: tuple[Method, ...] = ("ila", "price")  # `until_stable` ends their own loop


def num_steps(options: MaskOptions, num_gates: int) -> int | None:
    """How many steps a method reports, for progress; None where that is not known beforehand."""
    if options.method in STOPS_BY_ITSELF or options.method == "adalora":
        return options.mask_steps
    if options.until_stable is not None:
        return None
    if options.method == "elimination":
        return options.mask_batches * len(round_sizes(num_gates, options.keep_fraction))
    if options.method == "path":
        return options.mask_batches * (options.path_points + 2)
    if options.method == "leave-one-out":
        return options.mask_batches * (num_gates + 1)
    if options.method == "shapley":
        return options.permutations * (num_gates + 1)
    return options.mask_batches if options.method in READS_BATCHES_ONCE else None


def round_sizes(num_gates: int, keep_fraction: float) -> list[int]:
    """How many gates each round of `elimination` scores: all, then a share of the round before."""
    sizes = [num_gates]
    while sizes[-1] > SMALLEST_ROUND:
        sizes.append(min(sizes[-1] - 1, max(1, round(keep_fraction * sizes[-1]))))
    return sizes
