# SPDX-License-Identifier: Apache-2.0
"""Small trainers whose models carry updates; their scores by any method, and slopes by gates."""

import contextlib
import tempfile
from functools import cache
from itertools import islice

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer, TrainingArguments, set_seed

from keylayers.gates import gated
from keylayers.model.modules import map_modules
from keylayers.scores.methods import find_method
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates

from tiny_models import state_of, tiny_llama

STEP = 2**-6  # of gates
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


@contextlib.contextmanager
def masked(trainer, at):
    """Gates at a value in the trainer's model, and the trainer's loss."""
    source, updates = TrainerLoss(trainer), adapter_updates(trainer.model)
    with gated(trainer.model, updates, initial_score=at, link="identity") as gates, source.quiet():
        yield gates, source


def slopes(gates, at, loss, step=STEP, which=slice(None)):
    """Slopes of `loss()`: central differences of four points, exact up to the step's 4th power."""
    found = []
    for direction in torch.eye(len(gates), dtype=at.dtype)[which]:
        values = {}
        for steps in (-2, -1, 1, 2):
            gates.set_scores(at + steps * step * direction)
            values[steps] = float(loss())
        found.append((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step))
    return torch.tensor(found, dtype=at.dtype)


def check_gradient(gates, source, batch):
    """The gradient is the slope of the loss, within float32's rounding of the losses.

    Looks at every third gate: one of each projection, in every block of the tiny models.

    A loss L comes with an error of some roundings, 2**-24 L each and never below those of the
    numbers near 1 that it is made of. Measured are up to three; eight are allowed. Four losses
    enter a slope, with weights that sum to 1.5 / STEP.
    """
    at = 0.3 + 0.6 * torch.rand(len(gates), generator=torch.Generator().manual_seed(1))
    gates.set_scores(at)
    held = source.parts(batch)
    source.parts = lambda _: held  # GRPO: the same completions at every gate
    loss = source.backward(batch, step=1)
    gradient, some = gates.gradient(), slice(None, None, 3)
    measured = slopes(gates, at, lambda: source.value(batch, step=1), which=some)
    noise = 8 * 2**-24 * max(1.0, abs(loss)) * 1.5 / STEP
    assert (measured - gradient[some]).abs().max() < noise
    assert gradient.abs().median() > 10 * noise  # the noise could not hide a wrong gradient
