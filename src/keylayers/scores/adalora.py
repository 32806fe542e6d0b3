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
import time
from collections.abc import Sequence

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import Trainer, set_seed

from keylayers.errors import ConfigError
from keylayers.model.preserve import preserved
from keylayers.model.sharding import is_sharded
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import Update
from keylayers.updates.base_weight import check_linear

INITIAL_RANK = 8
TARGET_RANK = 2


def adalora(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The rank that AdaLoRA leaves each update's module; the fraction is its tie-breaker."""
    start = time.perf_counter()
    for update in updates:
        check_linear(update.layer)
    names = [update.module.name for update in updates]
    with preserved(trainer.model):
        seed = trainer.args.seed if options.mask_seed is None else options.mask_seed
        set_seed(seed)
        model = _adaptive_copy(trainer, names, options.mask_steps)
        source = TrainerLoss(trainer, model)
        with source.quiet():
            losses = _train(source, options.mask_steps, seed, on_step)
        scores = []
        for name in names:
            values = model.get_base_model().get_submodule(name).lora_E["default"].detach().abs()
            total = float(values.sum())
            scores.append(int((values > 0).sum()) + total / (1 + total))
    return ModuleScores(
        module_names=tuple(names),
        scores=tuple(scores),
        standard_errors=None,
        unit="ranks left",
        losses=tuple(losses),
        seconds=time.perf_counter() - start,
        num_forward=source.num_forward,
        num_backward=source.num_backward,
    )


def _adaptive_copy(trainer: Trainer, names: list[str], num_steps: int) -> PeftModel:
    """A copy of the base model with AdaLoRA on `names`.

    Raises:
        ConfigError: the model is spread over processes.
    """
    if is_sharded(trainer.model):
        raise ConfigError(
            "`method` must be another than adalora under FSDP, whose models cannot be copied; rank "
            "in one process, under DDP, or by elimination"
        )
    base = copy.deepcopy(trainer.model)
    if isinstance(base, PeftModel):
        base = base.unload()
    config = AdaLoraConfig(
        init_r=INITIAL_RANK,
        target_r=TARGET_RANK,
        lora_alpha=2 * INITIAL_RANK,
        tinit=num_steps // 10,
        tfinal=3 * num_steps // 10,
        deltaT=1,
        total_step=num_steps,
        target_modules=names,
    )
    return get_peft_model(base, config)


def _train(source: TrainerLoss, num_steps: int, seed: int, on_step: OnStep | None) -> list[float]:
    """Train the copy, lowering its budget after each step."""
    trained = [one for one in source.model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=source.trainer.args.learning_rate, weight_decay=0.0)
    batches = source.batches(seed)
    model = source.model
    assert isinstance(model, PeftModel)
    losses = []
    for step in range(1, num_steps + 1):
        losses.append(source.backward(next(batches), step=step))
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if on_step is not None:
            on_step(step, losses[-1])
    return losses
