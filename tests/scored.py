# SPDX-License-Identifier: Apache-2.0
"""Small trainers whose models carry updates, and their scores by any method."""

import tempfile
from functools import cache
from itertools import islice

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainingArguments, set_seed

from keylayers.model.modules import map_modules
from keylayers.scores.methods import find_method
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates

from tiny_models import state_of, tiny_llama

FAST = {"mask_batches": 2, "permutations": 2, "mask_steps": 20}
PLANTED = "model.layers.1.mlp.up_proj"


def data(num_rows=24):
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 64, (num_rows, 12), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(kind=TrainingArguments, **options):
    own = {
        "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "per_device_train_batch_size": 4, "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        "output_dir": tempfile.mkdtemp(),  # trainers make their folder
    }  # fmt: skip
    return kind(**own | options)


def noisy_model():
    """A model with random LoRA updates on all modules."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def planted_model():
    """A model in which one module carries a useful update and all others one of zero."""
    torch.manual_seed(6)
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and PLANTED in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    rows = torch.tensor(data()["input_ids"])
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return model


def trainer_of(model, num_rows=24, **options):
    return Trainer(model=model, args=arguments(**options), train_dataset=data(num_rows))


@cache
def noisy():
    """A trainer for tests that leave it as it was."""
    return trainer_of(noisy_model())


@cache
def eight_rows():
    """A trainer for tests that leave it as it was: two batches are all of its data."""
    return trainer_of(noisy_model(), 8)


@cache
def planted():
    """A trainer for tests that leave it as it was."""
    return trainer_of(planted_model())


def batches_of(trainer, count, seed=42):
    """The batches that a method with that seed sees; by default the trainer's."""
    source = TrainerLoss(trainer)
    with source.quiet():
        set_seed(seed)
        return list(islice(source.batches(seed), count))


def written_out(gates, batch):
    """The loss of `noisy()` with its updates scaled, in model order: weights by hand, no gates."""
    base, tuned, weights = tiny_llama(), noisy().model.get_base_model(), {}
    for gate, module in zip(gates, map_modules(base), strict=True):
        layer = tuned.get_submodule(module.name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        update = layer.scaling["default"] * product.detach()
        weights[f"{module.name}.weight"] = layer.base_layer.weight + gate * update
    return torch.func.functional_call(base, weights, kwargs=dict(batch)).loss


def slopes_of(gates, batch):
    """The gradient of that loss by the gates, by autograd."""
    gates = gates.clone().requires_grad_()
    return torch.autograd.grad(written_out(gates, batch), gates)[0]


def options_of(method, **values):
    """Options that make a method fast."""
    fast = {name: FAST[name] for name in find_method(method).option_names if name in FAST}
    return scoring_options(method, **fast | values)


def score(trainer, method, updates=None, on_step=None, **values):
    """The scores of a trainer's modules, in model order unless `updates` have another."""
    updates = updates or adapter_updates(trainer.model)
    return score_modules(trainer, updates, options_of(method, **values), on_step)


def by_name(found):
    return dict(zip(found.module_names, found.scores, strict=True))


def scores_of(trainer, method, **values):
    """Module name -> score."""
    return by_name(score(trainer, method, **values))


def frozen(value):
    """A value as something that can be compared: containers by content, tensors by bits."""
    if isinstance(value, dict):
        return {key: frozen(held) for key, held in value.items()}
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.tolist())
    if isinstance(value, (str, bytes, bool, int, float, type(None))):
        return value
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return [frozen(held) for held in value]
    return id(value)


def everything(trainer):
    """The trainer and its model: weights, flags, gradients, modes, hooks, adapters, state."""
    model = trainer.model
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    owners = (trainer, trainer.state, trainer.accelerator, trainer.accelerator.gradient_state)
    return state_of(model) | {
        "active": [(layer.active_adapters, layer.disable_adapters) for layer in layers],
        "adapters": (model.active_adapter, sorted(model.peft_config)),
        "state": [frozen(vars(owner)) for owner in owners],
    }
