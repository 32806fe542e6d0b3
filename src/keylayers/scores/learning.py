# SPDX-License-Identifier: Apache-2.0
"""Learn a score for each gate by gradient descent on the trainer's loss, all else frozen."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer, set_seed

from keylayers.errors import GuardError
from keylayers.gates import Gates, gated
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, to_modules
from keylayers.scores.stable_selection import SettledSelection
from keylayers.trainers.log import TrainerLog
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import Update

NUM_STRETCHES = 10
PATIENCE_STEPS = 10


def learn_scores(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
    *,
    initial_score: float,
    price: float = 0.0,
) -> ModuleScores:
    """The scores that gradient descent on the trainer's own loss gives the gates on `updates`.

    Guards: the optimiser holds exactly the gates; every gate fires and has a gradient; no weight of
    the model changes; the model and the random state are given back as they were.

    Args:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `adapter_updates` or `dense_updates` on that model.
        options: How to learn.
        on_step: Called after each step with its number, from 1, and its loss in nats.
        initial_score: Every score at first.
        price: Of the mean gate, in nats, added to the loss.

    Raises:
        LossError: the loss became NaN or infinite.
        GuardError: one of the guards failed.
    """
    start = time.perf_counter()
    source = TrainerLoss(trainer)
    losses: list[float] = []
    log = TrainerLog(trainer)
    on_step = log.losses(on_step)
    watch = None
    if options.until_stable is not None:
        watch = SettledSelection(options.until_stable, PATIENCE_STEPS)
    with (
        gated(
            trainer.model,
            updates,
            initial_score=initial_score,
            granularity=options.granularity,
        ) as gates,
        source.quiet(),
    ):
        seed = trainer.args.seed if options.mask_seed is None else options.mask_seed
        set_seed(seed)
        optimizer = _optimizer(gates, options)
        batches = source.batches(seed)
        path = torch.empty(options.mask_steps + 1, len(gates))  # filled as it goes: nothing grows
        path[0] = gates.scores()
        for step in range(1, options.mask_steps + 1):
            optimizer.zero_grad()
            losses.append(source.backward(next(batches), step=step))
            gates.gradient()  # a guard: every gate took part
            _add_price(gates, price)
            optimizer.step()
            path[step] = gates.scores()
            log.gates(step, gates.groups, path[step])
            if on_step is not None:
                on_step(step, losses[-1])
            if watch is not None and watch.see(path[step].tolist()) and step >= 2 * PATIENCE_STEPS:
                break
        gates.check_fired()
        scores = to_modules(gates, gates.scores(), updates)
        errors = standard_errors(path[: len(losses) + 1])
        module_errors = None if errors is None else to_modules(gates, errors, updates)
    return ModuleScores(
        module_names=tuple(update.module.name for update in updates),
        scores=scores,
        standard_errors=module_errors,
        unit="logit of the gate",
        losses=tuple(losses),
        seconds=time.perf_counter() - start,
        num_forward=source.num_forward,
        num_backward=source.num_backward,
    )


def _add_price(gates: Gates, price: float) -> None:
    """Add the gradient of `price` times the mean gate."""
    for parameter in gates.parameters():
        assert parameter.grad is not None
        value = torch.sigmoid(parameter.detach())
        parameter.grad += price / len(gates) * value * (1 - value)


def standard_errors(path: Float[Tensor, "step gate"]) -> Float[Tensor, " gate"] | None:
    """How far each learned score would vary over other draws of the batches, to first order.

    The path of a score is cut into ten equal stretches. What it moves in each is the sum of a
    slowly changing drift and of batch noise; successive differences cancel the drift, so half their
    mean square is the noise variance of a stretch (von Neumann's estimator), and ten of them add up
    to that of the whole path.

    Args:
        path: Scores before the first step and after each step.

    Returns:
        Standard errors in units of the score, or None if there are fewer than 20 steps.
    """
    num_steps = len(path) - 1
    if num_steps < 2 * NUM_STRETCHES:
        return None
    ends = torch.linspace(0, num_steps, NUM_STRETCHES + 1).round().long()
    moves = path[ends].diff(dim=0)
    noise_variance = moves.diff(dim=0).square().mean(dim=0) / 2
    return (NUM_STRETCHES * noise_variance).sqrt()


def _optimizer(gates: Gates, options: MaskOptions) -> torch.optim.Optimizer:
    """SGD or Adam without weight decay, over exactly the gates."""
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[options.mask_optimizer]
    optimizer = kind(gates.parameters(), lr=options.resolved_learning_rate)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != {id(parameter) for parameter in gates.parameters()}:
        raise GuardError(
            "the mask optimiser must hold exactly the gates, but it holds something else"
        )
    return optimizer
