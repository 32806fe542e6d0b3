# SPDX-License-Identifier: Apache-2.0
"""Gradient and path together: which modules to train from the start.

    s_i = g_i / Σ|g| + p_i / Σ|p|      g of `gradient-norm`, p of `path`

Two looks at the same fine-tune: how strongly the loss of the base model pulls at a weight, and what
its update adds in the end. Either alone misleads. A module with a large gradient may move far in
the first steps and matter little later; a large share in the end may be work that another module
would do as well.

Source: keylayers; found by how well sums of scores order sets of modules as their losses do after
    training from scratch (experiments/LOG.md, "do scores predict retraining?").
Differs: a sum of two published scores, each divided by its sum over the modules.
Cost: (`path_points` + 1) x `mask_batches` forward and backward passes, and one weight gradient at a
    time.
Blind to: how modules of a small set make up for the missing ones. What a single update is worth
    in its own fine-tune is better seen by `elimination`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.gradient_norm import gradient_norms
from keylayers.scores.options import GradientPathOptions
from keylayers.scores.path import path_shares
from keylayers.scores.task import ModuleScores, Task


def gradient_path(task: Task, options: GradientPathOptions) -> ModuleScores:
    """The module's part of all gradients of the base model, plus its part of what was gained."""
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        pull = gradient_norms(masked, task).double()
        gain = path_shares(masked, options.path_points)
        return masked.mean(sum_of_shares(pull, gain), unit="parts of both sums")


def sum_of_shares(
    pull: Float[Tensor, "batch module"], gain: Float[Tensor, "batch module"]
) -> Float[Tensor, "batch module"]:
    """Both scores of each batch, each divided by the sum over the modules of its mean's size."""
    tiny = torch.finfo(pull.dtype).tiny
    first, second = (rows / rows.mean(dim=0).abs().sum().clamp(min=tiny) for rows in (pull, gain))
    return first + second
