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

from typing import Any

from torch import Tensor

from keylayers.scores.options import Batched
from keylayers.scores.probe import layer_values, linear_layers, tokens_of
from keylayers.scores.task import ModuleScores, Task


def lora_drop(task: Task, options: Batched) -> ModuleScores:
    """The mean squared output of each update in the fine-tuned model."""

    def size(batch: Any, index: int, x: Tensor, _: Tensor) -> float:
        output = tokens_of(batch, x) @ task.updates[index].delta().to(x.device).T
        return float(output.square().sum(dim=-1).mean())

    with task.masked(options.mask_batches, looks_inside=True) as masked:
        sizes = layer_values(masked, linear_layers(task), size, gates=1.0)
        return masked.mean(sizes, unit="squared norm of the output")
