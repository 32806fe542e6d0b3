# SPDX-License-Identifier: Apache-2.0
"""ILA: the gates that gradient descent learns on what a fine-tune added.

    minimise over s   E[ L(θ_0 + sigmoid(s) ⊙ Δθ_t) ]        score_i = s_i

Source: Shi, Lu, Dong, Zhang, Zhang, Feng, Wu: "Understanding Layer Significance in LLM Alignment",
    COLM 2025, arXiv:2410.17875. We have only its abstract and reviews; the formula, the initial
    scores (4, 2, 1) and the dropped constraint `‖γ‖ < H` are from memory of its text.
Differs: we do not know the paper's optimiser and learning rate; plain SGD is the default because it
    ranks better than Adam by the mask curve (experiments/LOG.md). Stage 1 ends when the
    loss of a few examples surely falls no further.
Cost: per mask step one forward and one backward pass for activations; the memory of the frozen
    model.
Blind to: the constraint that the relaxation drops. At a stationary point of stage 1 the gradient at
    γ = 1 is zero, so the scores follow curvature and noise; and modules that can replace each
    other share the credit by chance.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.options import IlaOptions, LearnedOptions
from keylayers.scores.task import MaskedModel, ModuleScores, Task
from keylayers.scores.until_stable import StableSelection

NUM_STRETCHES = 10
PATIENCE_STEPS = 10


def ila(task: Task, options: IlaOptions) -> ModuleScores:
    """The learned score of each update's module, as published."""
    return learn_scores(task, options, initial_score=options.initial_score)


def learn_scores(
    task: Task, options: LearnedOptions, *, initial_score: float, price: float = 0.0
) -> ModuleScores:
    """The scores that gradient descent gives the gates; `price` is that of the mean gate, in nats.

    Guards: only gates are trainable; every gate has a gradient; the model and the random state are
    given back as they were.
    """
    watch = None
    if options.until_stable is not None:
        watch = StableSelection(options.until_stable, PATIENCE_STEPS)
    with task.masked(
        0, granularity=options.granularity, initial_score=initial_score, link="sigmoid"
    ) as masked:
        gates = masked.gates
        optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[options.mask_optimizer]
        optimizer = optimizer_class(gates.parameters(), lr=options.resolved_learning_rate)
        path = torch.empty(options.mask_steps + 1, len(gates))  # allocated once: nothing grows
        path[0] = gates.scores()
        for step in range(1, options.mask_steps + 1):
            optimizer.zero_grad()
            masked.backward(next(masked.stream))
            _add_price(masked, price)
            optimizer.step()
            path[step] = gates.scores()
            task.log.gates(step, gates.groups, path[step])
            if watch is not None and watch.see(path[step].tolist()) and step >= 2 * PATIENCE_STEPS:
                break
        return masked.result(
            gates.scores(),
            unit="logit of the gate",
            standard_errors=standard_errors(path[: step + 1]),
            findings={"learning_rate": options.resolved_learning_rate},
        )


def _add_price(masked: MaskedModel, price: float) -> None:
    """Add the gradient of `price` times the mean gate; parts count by their parameters."""
    parameters, costs = masked.gates.parameters(), masked.costs
    shares = (price * costs / costs.sum()).split([len(parameter) for parameter in parameters])
    for parameter, share in zip(parameters, shares, strict=True):
        assert parameter.grad is not None
        value = torch.sigmoid(parameter.detach())
        parameter.grad += share.to(value) * value * (1 - value)


def standard_errors(path: Float[Tensor, "step gate"]) -> Float[Tensor, " gate"] | None:
    """How far each learned score would vary over other draws of the batches, to first order.

    The path of a score is cut into ten equal stretches. The move in each stretch is the sum of a
    slowly changing drift and batch noise. Successive differences cancel the drift, so half their
    mean square is the noise variance of a stretch (von Neumann's estimator), and ten of them add up
    to the variance of the whole path. None for fewer than 20 steps.
    """
    num_steps = len(path) - 1
    if num_steps < 2 * NUM_STRETCHES:
        return None
    ends = torch.linspace(0, num_steps, NUM_STRETCHES + 1).round().long()
    moves = path[ends].diff(dim=0)
    noise_variance = moves.diff(dim=0).square().mean(dim=0) / 2
    return (NUM_STRETCHES * noise_variance).sqrt()
