# SPDX-License-Identifier: Apache-2.0
"""Update norm: how far the fine-tune moved a weight.

    s_i = ‖Δθ_i‖_F

Source: magnitude, the oldest pruning criterion; Han, Pool, Tran, Dally: "Learning both Weights and
    Connections for Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626.
Differs: the norm of what was added to a whole weight matrix, not the size of single weights.
Cost: no pass; one product of B and A a module.
Blind to: what the update does to the loss. Modules with larger inputs need smaller updates.
"""

import time
from collections.abc import Sequence

from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, data_free
from keylayers.updates import Update


def update_norm(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The Frobenius norm of each update."""
    start = time.perf_counter()
    values = [float(update.delta().norm()) for update in updates]
    seconds = time.perf_counter() - start
    return data_free(updates, values, unit="Frobenius norm", seconds=seconds)
