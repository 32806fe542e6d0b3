# SPDX-License-Identifier: Apache-2.0
"""Price: learned gates that must be worth their price.

    minimise over s   E[ L(θ_0 + sigmoid(s) ⊙ Δθ_t) ] + price · mean(sigmoid(s))    score_i = s_i

The constraint that the published relaxation drops, as a penalty on the mean gate.

Source: keylayers; the penalty form of the constraint in ILA's definition (Shi et al., COLM 2025,
    arXiv:2410.17875; from memory of its text).
Differs: gates start half open, where the slope of the sigmoid is largest.
Cost: `mask_steps` forward and backward passes for activations.
Blind to: the scale of the loss: `price` is in nats for the whole mask, so the same price can be
    high for one data set and low for another.
"""

from keylayers.scores.ila import learn_scores
from keylayers.scores.options import PriceOptions
from keylayers.scores.task import ModuleScores, Task

HALF_OPEN = 0.0  # the score of a gate of one half


def price(task: Task, options: PriceOptions) -> ModuleScores:
    """The learned score of each update's module under `options.price`."""
    return learn_scores(task, options, initial_score=HALF_OPEN, price=options.price)
