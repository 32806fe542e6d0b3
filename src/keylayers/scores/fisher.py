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

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.probe import observed_gradients, per_example
from keylayers.scores.scoring import Scoring, mean_and_error, scoring
from keylayers.updates import Update


def fisher(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The mean squared gradient norm of single examples for each update's module."""
    with scoring(trainer, updates, options, on_step, looks_inside=True) as task:
        traces = torch.stack([_traces(task, batch) for batch in task.batches])
        mean, error = mean_and_error(traces)
        return task.result(mean, unit="squared norm of the gradient", standard_errors=error)


def _traces(task: Scoring, batch: Any) -> Float[Tensor, " module"]:
    traces = torch.zeros(len(task.updates))

    def see(index: int, x: Tensor, grad_y: Tensor) -> None:
        if x.dim() == 3 and len(x) > task.source.trainer._train_batch_size:
            raise ConfigError(
                "`method` fisher needs one row an example, but this trainer's examples are several "
                "rows each, such as the two answers of a pair; choose gradient-norm"
            )
        # ‖Σ_t g_t x_tᵀ‖² = Σ_tu (g_t·g_u)(x_t·x_u): no gradient of the weight is made
        x, grad_y = per_example(x, batch), per_example(grad_y, batch)
        rows = zip(x.float(), grad_y.float(), strict=True)
        squares = [float((_gram(x_row) * _gram(grad_row)).sum()) for x_row, grad_row in rows]
        traces[index] = sum(squares) * len(x)

    with observed_gradients(task.updates, see):
        task.gradient(0.0, batch)
    return traces


def _gram(tokens: Tensor) -> Tensor:
    return tokens @ tokens.T
