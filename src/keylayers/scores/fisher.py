# SPDX-License-Identifier: Apache-2.0
"""Fisher: how much information the data hold about a weight of the base model.

    s_i = mean over examples of ‖∂ log p(example) / ∂W_i (θ_0)‖²

The trace of the empirical Fisher matrix.

Source: the empirical Fisher as used for importance by Kirkpatrick et al.: "Overcoming catastrophic
    forgetting in neural networks", PNAS 2017, arXiv:1612.00796; as a choice of what to fine-tune by
    Sung, Nair, Raffel: "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021,
    arXiv:2111.09839, equation 4.
Differs: summed over a whole module. An example is a row of the batch, and log p is minus the
    trainer's loss times the number of rows: exact up to how the loss weighs rows.
Cost: `mask_batches` forward and backward passes, and token × token products in each module.
Blind to: the direction in which the fine-tune moves; large where the model is uncertain anyway.
"""

from typing import Any

from torch import Tensor

from keylayers.errors import ConfigError
from keylayers.scores.options import Batched
from keylayers.scores.probe import layer_values, linear_layers, per_example
from keylayers.scores.task import ModuleScores, Task


def fisher(task: Task, options: Batched) -> ModuleScores:
    """The mean squared gradient norm of single examples for each update's module."""

    def trace(batch: Any, _: int, x: Tensor, grad_y: Tensor) -> float:
        if x.dim() == 3 and len(x) > task.trainer._train_batch_size:
            raise ConfigError(
                "`method` fisher needs one row per example, but this trainer's examples have "
                "several rows, such as the two answers of a pair; choose gradient-norm"
            )
        # ‖Σ_t g_t x_tᵀ‖² = Σ_tu (g_t·g_u)(x_t·x_u) needs no gradient of the weight
        x, grad_y = per_example(x, batch), per_example(grad_y, batch)
        rows = zip(x.float(), grad_y.float(), strict=True)
        squares = [float(((own @ own.T) * (grad @ grad.T)).sum()) for own, grad in rows]
        return sum(squares) * len(squares)

    with task.masked(options.mask_batches, looks_inside=True) as masked:
        traces = layer_values(masked, linear_layers(task), trace, with_gradient=True)
        return masked.mean(traces, unit="squared norm of the gradient")
