# SPDX-License-Identifier: Apache-2.0
"""LoRA-drop: how large the output of each update is on the data.

    s_i = mean over tokens of ‖Δθ_i x‖²

Source: Zhou, Lu, Xu, Zhu, Zhao, Yang: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output
    Evaluation", COLING 2025, arXiv:2402.07721.
Differs: not divided by the sum over modules, which keeps the order. The paper also lets the modules
    it leaves out share one LoRA, which is not part of a ranking. No code is public.
Cost: `mask_batches` forward passes.
Blind to: whether the output helps the loss; modules with large outputs win.
"""

from jaxtyping import Float
from torch import Tensor

from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import Batched
from keylayers.scores.probe import input_values
from keylayers.scores.task import Task
from keylayers.updates import Update


def lora_drop(task: Task, options: Batched) -> ModuleScores:
    """The mean squared output of each update in the fine-tuned model."""
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        sizes = input_values(masked, task.updates, _output_size, gates=1.0)
        return masked.mean(sizes, unit="squared norm of the output")


def _output_size(update: Update, tokens: Float[Tensor, "token d_in"]) -> float:
    output = tokens @ update.delta().to(tokens.device).T
    return float(output.square().sum(dim=-1).mean())
