# SPDX-License-Identifier: Apache-2.0
"""Update norm: how far the fine-tune moved a weight.

    s_i = ‖Δθ_i‖_F

Source: magnitude, the oldest pruning criterion; Han, Pool, Tran, Dally: "Learning both Weights and
    Connections for Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626.
Differs: the norm of a whole matrix's change, not the size of single weights.
Cost: no pass; one product of B and A per module.
Blind to: what the update does to the loss. Modules with larger inputs need smaller updates.
"""

from keylayers.scores.options import MethodOptions
from keylayers.scores.task import ModuleScores, Task


def update_norm(task: Task, options: MethodOptions) -> ModuleScores:
    """The Frobenius norm of each update."""
    norms = [float(update.delta().norm()) for update in task.updates]
    return task.result(norms, unit="Frobenius norm")
