# SPDX-License-Identifier: Apache-2.0
"""Learn a score for each gate by gradient descent on the trainer's loss, all else frozen."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import set_seed

from keylayers.errors import GuardError
from keylayers.gates import Gates, gated
from keylayers.scores.module_scores import ModuleScores, to_modules
from keylayers.scores.options import LearnedOptions
from keylayers.scores.stable_selection import StableSelection
from keylayers.scores.task import Task
from keylayers.trainers.log import TrainerLog
from keylayers.trainers.loss import TrainerLoss

NUM_STRETCHES = 10
PATIENCE_STEPS = 10


def learn_scores(
    task: Task, options: LearnedOptions, *, initial_score: float, price: float = 0.0
) -> ModuleScores:
    """The scores that gradient descent on the trainer's own loss gives the gates on the updates.

    Guards: the optimiser holds exactly the gates; every gate fires and has a gradient; no weight of
    the model changes; the model and the random state are given back as they were.

    Args:
        task: What to score.
        options: How to learn.
        initial_score: Every score at first.
        price: Price of the mean gate, in nats, added to the loss.

    Raises:
        LossError: the loss became NaN or infinite.
        GuardError: a guard failed.
    """
    source = TrainerLoss(task.trainer)
    log = TrainerLog(task.trainer)
    on_step = log.losses(task.on_step)
    losses: list[float] = []
    watch = None
    if options.until_stable is not None:
        watch = StableSelection(options.until_stable, PATIENCE_STEPS)
    gates_in = gated(
        task.trainer.model,
        task.updates,
        initial_score=initial_score,
        granularity=options.granularity,
    )
    with gates_in as gates, source.quiet():
        set_seed(task.seed)
        optimizer = _optimizer(gates, options)
        batches = source.batches(task.seed)
        path = torch.empty(options.mask_steps + 1, len(gates))  # allocated once: nothing grows
        path[0] = gates.scores()
        for step in range(1, options.mask_steps + 1):
            optimizer.zero_grad()
            losses.append(source.backward(next(batches), step=step))
            gates.gradient()  # a guard: raises unless every gate took part
            _add_price(gates, price)
            optimizer.step()
            path[step] = gates.scores()
            log.gates(step, gates.groups, path[step])
            if on_step is not None:
                on_step(step, losses[-1])
            if watch is not None and watch.see(path[step].tolist()) and step >= 2 * PATIENCE_STEPS:
                break
        gates.check_fired()
        scores = to_modules(gates, gates.scores(), task.updates)
        errors = standard_errors(path[: len(losses) + 1])
        module_errors = None if errors is None else to_modules(gates, errors, task.updates)
    return task.result(
        scores,
        unit="logit of the gate",
        standard_errors=module_errors,
        losses=tuple(losses),
        num_forward=source.num_forward,
        num_backward=source.num_backward,
        findings={"learning_rate": options.resolved_learning_rate},
    )


def _add_price(gates: Gates, price: float) -> None:
    """Add the gradient of `price` times the mean gate."""
    for parameter in gates.parameters():
        assert parameter.grad is not None
        value = torch.sigmoid(parameter.detach())
        parameter.grad += price / len(gates) * value * (1 - value)


def standard_errors(path: Float[Tensor, "step gate"]) -> Float[Tensor, " gate"] | None:
    """How far each learned score would vary over other draws of the batches, to first order.

    The path of a score is cut into ten equal stretches. The move in each stretch is the sum of a
    slowly changing drift and batch noise. Successive differences cancel the drift, so half their
    mean square is the noise variance of a stretch (von Neumann's estimator), and ten of them add up
    to the variance of the whole path.

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


def _optimizer(gates: Gates, options: LearnedOptions) -> torch.optim.Optimizer:
    """SGD or Adam without weight decay, over exactly the gates."""
    optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[options.mask_optimizer]
    optimizer = optimizer_class(gates.parameters(), lr=options.resolved_learning_rate)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if held != {id(parameter) for parameter in gates.parameters()}:
        raise GuardError(
            "the mask optimiser must hold exactly the gates, but it holds something else"
        )
    return optimizer
