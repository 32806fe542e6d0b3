# SPDX-License-Identifier: Apache-2.0
"""When stage 1 may stop: the loss is ε-stable.

The paper asks that for every later step the expected loss changes by less than ε (from memory of
its text). The future is not known while training runs, so keylayers compares the two latest
windows: the mean loss of the last `window` steps against that of the `window` steps before. A mask
from 25-50 % of training agrees with the final one, one from 1 % does not (from memory of the
paper): a window should be a few per cent of a full training.
"""

from collections.abc import Sequence

from keylayers.training.options import StabilityOptions


def is_stable(losses: Sequence[float], options: StabilityOptions) -> bool:
    """Whether the loss, one value in nats a step, is ε-stable at its end."""
    change = change_nats(losses, options.window)
    return change is not None and abs(change) < options.epsilon


def change_nats(losses: Sequence[float], window: int) -> float | None:
    """Mean of the last `window` losses minus that of the `window` before; None if too few."""
    if len(losses) < 2 * window:
        return None
    last, before = losses[-window:], losses[-2 * window : -window]
    return (sum(last) - sum(before)) / window
