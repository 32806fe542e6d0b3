# SPDX-License-Identifier: Apache-2.0
"""The gradient of the gates against slopes of the loss, which is computed in float32."""

import contextlib

import torch

from keylayers.gates import gated
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates

STEP = 2**-6  # of the gates


@contextlib.contextmanager
def masked(trainer, at):
    """Gates at a value in the trainer's model, and the trainer's loss."""
    source, updates = TrainerLoss(trainer), adapter_updates(trainer.model)
    with (
        gated(trainer.model, updates, initial_score=at, link="identity") as gates,
        source.quiet(),
    ):
        yield gates, source


def slopes(gates, at, loss, step=STEP, which=slice(None)):
    """Slopes of `loss()`: central differences of four points, exact up to the step's 4th power."""
    found = []
    for direction in torch.eye(len(gates), dtype=at.dtype)[which]:
        values = {}
        for steps in (-2, -1, 1, 2):
            gates.set_scores(at + steps * step * direction)
            values[steps] = float(loss())
        found.append((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step))
    return torch.tensor(found, dtype=at.dtype)


def check_gradient(gates, source, batch):
    """The gradient is the slope of the loss, within float32's rounding of the losses.

    Looks at every third gate: one of each projection, in every block of the tiny models.

    A loss L comes with an error of some roundings, 2**-24 L each and never below those of the
    numbers near 1 that it is made of. Measured are up to three; eight are allowed. Four losses
    enter a slope, with weights that sum to 1.5 / STEP.
    """
    at = 0.3 + 0.6 * torch.rand(len(gates), generator=torch.Generator().manual_seed(1))
    gates.set_scores(at)
    held = source.parts(batch)
    source.parts = lambda _: held  # GRPO: the same completions at every gate
    loss = source.backward(batch, step=1)
    gradient, some = gates.gradient(), slice(None, None, 3)
    measured = slopes(gates, at, lambda: source.value(batch, step=1), which=some)
    noise = 8 * 2**-24 * max(1.0, abs(loss)) * 1.5 / STEP
    assert (measured - gradient[some]).abs().max() < noise
    assert gradient.abs().median() > 10 * noise  # the noise could not hide a wrong gradient
