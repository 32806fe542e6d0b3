# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: the LoRA rank that AdaLoRA's own training leaves a module.

    Δθ_i = P_i Λ_i Q_i;  singular values with the least smoothed sensitivity |w ∂L/∂w| times
    uncertainty are set to zero until a quarter of the ranks are left;      s_i = ranks left

Source: Zhang et al.: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    ICLR 2023, arXiv:2303.10512, equations 8 to 11; PEFT's implementation trains and allocates.
Differs: a short training for its allocation alone: a tenth of `mask_steps` before the budget falls,
    three tenths after. Equal ranks are told apart by the sum of the singular values.
Cost: `mask_steps` training steps on a copy of the base model, with its memory.
Blind to: the update that is ranked; it makes its own.
"""

import copy

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from keylayers.errors import ConfigError
from keylayers.model.preserve import preserved
from keylayers.model.sharding import is_sharded
from keylayers.scores.options import AdaLoraOptions
from keylayers.scores.probe import linear_layers
from keylayers.scores.task import ModuleScores, Task
from keylayers.trainers.loss import TrainerLoss

INITIAL_RANK = 8
TARGET_RANK = 2


def adalora(task: Task, options: AdaLoraOptions) -> ModuleScores:
    """The rank that AdaLoRA leaves each update's module; the fraction is its tie-breaker."""
    trainer, num_steps = task.trainer, options.mask_steps
    linear_layers(task)
    if is_sharded(trainer.model):
        raise ConfigError(
            "`method` must be another than adalora under FSDP, whose models cannot be copied; rank "
            "in one process, under DDP, or by elimination"
        )
    config = AdaLoraConfig(
        init_r=INITIAL_RANK,
        target_r=TARGET_RANK,
        lora_alpha=2 * INITIAL_RANK,
        tinit=num_steps // 10,
        tfinal=3 * num_steps // 10,
        deltaT=1,
        total_step=num_steps,
        target_modules=list(task.module_names),
    )
    with preserved(trainer.model):
        set_seed(task.seed)
        base = copy.deepcopy(trainer.model)
        model = get_peft_model(base.unload() if isinstance(base, PeftModel) else base, config)
        source = TrainerLoss(trainer, model)
        with source.quiet():
            losses = _train(model, source, num_steps, task)
        scores = []
        for name in task.module_names:
            values = model.get_base_model().get_submodule(name).lora_E["default"].detach().abs()
            total = float(values.sum())
            scores.append(int((values > 0).sum()) + total / (1 + total))
    return task.result(
        scores,
        unit="ranks left",
        losses=tuple(losses),
        num_forward=source.num_forward,
        num_backward=source.num_backward,
    )


def _train(model: PeftModel, source: TrainerLoss, num_steps: int, task: Task) -> list[float]:
    """Train the copy, lowering its budget after each step."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.trainer.args.learning_rate, weight_decay=0.0)
    batches = source.batches(task.seed)
    losses = []
    for step in range(1, num_steps + 1):
        losses.append(source.backward(next(batches), step=step))
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        task.log.loss(step, losses[-1])
    return losses
