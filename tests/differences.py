# SPDX-License-Identifier: Apache-2.0
"""Slopes of a loss that is computed in float32, and how far its rounding puts them off."""

import torch

STEP = 2**-6  # of the gates


def slopes_of(gates, at, value):
    """Central differences of six points for each gate, exact up to the sixth power of the step.

    Args:
        gates: All gates of a model; they stay where the last difference put them.
        at: Where the slopes are wanted.
        value: Gives the loss at the gates as they are.
    """

    def slope(direction):
        values = {}
        for steps in (-3, -2, -1, 1, 2, 3):
            gates.set_scores(at + steps * STEP * direction)
            values[steps] = value()
        near, middle, far = (values[steps] - values[-steps] for steps in (1, 2, 3))
        return (45 * near - 9 * middle + far) / (60 * STEP)

    return torch.tensor([slope(direction) for direction in torch.eye(len(gates))])


def noise_of(loss):
    """What float32's rounding of the losses can make of a slope.

    A loss L comes with an error of some roundings, 2**-24 L each and never below those of the
    numbers near 1 that it is made of. Measured are up to three; eight are allowed. Six losses
    enter, with weights that sum to 11 / 6 / STEP.
    """
    return 8 * 2**-24 * max(1.0, abs(loss)) * 11 / 6 / STEP
