# SPDX-License-Identifier: Apache-2.0
"""The trainer's own loss and its gradient, for any trainer.

No code here knows the objective: every `transformers.Trainer`, TRL trainer or subclass with its own
`compute_loss` works, because gates are the only trainable parameters while modules are scored.

The reference model of a preference loss must not contain the update that is ranked. TRL 1.16 copies
the adapter of a trainer's model to a second one, "ref", as the reference
(https://github.com/huggingface/trl/pull/4723). If the adapter is trained afterwards, that is the
start of training. If it was finished, the loss would compare the update with itself: we hide "ref",
so that TRL disables the adapter for the reference pass and uses the base model.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from keylayers.errors import ConfigError, LossError
from keylayers.model.modules import base_model_of
from keylayers.model.preserve import restored, to_evaluation, unchanged_trainer
from keylayers.processes import is_one_of_many, summed
from keylayers.trainers.data import (
    give_every_batch,
    num_labels,
    own_copy,
    samples,
    training_batches,
)
from keylayers.updates.adalora import without_penalty

REFERENCE_ADAPTER = "ref"  # TRL's name for it


@dataclass(frozen=True)
class BatchLosses:
    """The mean loss of each of several batches in nats, and its labelled tokens (or its rows)."""

    losses: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Weighted mean in nats: over all labelled tokens of all batches."""
        products = (loss * weight for loss, weight in zip(self.losses, self.weights, strict=True))
        return sum(products) / sum(self.weights)


class TrainerLoss:
    """Batches and losses of a trainer, without its optimiser, schedule, checkpoints or log.

    Attributes:
        model: The model whose loss it is: the trainer's own by default.
        num_forward: Forward passes over a batch so far.
        num_backward: Backward passes over a batch so far.
    """

    def __init__(
        self, trainer: Trainer, model: nn.Module | None = None, *, sees_every_batch: bool = False
    ) -> None:
        """With `sees_every_batch`, each process computes all batches, not its own part of them."""
        if getattr(trainer, "use_vllm", False):
            raise ConfigError(
                "completions must be sampled from the masked model, but vLLM holds a copy without "
                "gates; build the trainer with use_vllm=False"
            )
        self.trainer = trainer
        self.model = trainer.model if model is None else model
        self.num_forward = 0
        self.num_backward = 0
        self._sees_every_batch = sees_every_batch
        self._is_shared = is_one_of_many() and not sees_every_batch

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Restore the trainer afterwards; inside, its reference is not the update itself."""
        with unchanged_trainer(self.trainer), _without_own_copy(self.trainer):
            # transformers 5.23 sets this only in `train`, but some trainers divide the loss by it.
            self.trainer.current_gradient_accumulation_steps = 1
            if self._sees_every_batch:
                give_every_batch(self.trainer)
            yield

    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches without end, in an order by `seed`; inside `quiet` alone."""
        return training_batches(self.trainer, seed)

    def parts(self, batch: Any) -> list[Any]:
        """The batch as the trainer prepares it.

        One that samples generates new completions, in as many parts as it would take steps on them.
        """
        trainer = self.trainer
        self.model.train()  # TRL's samplers (1.16) fill `_buffered_inputs` in training mode only
        if not samples(trainer):
            return [trainer._prepare_inputs(own_copy(batch))]
        trainer._buffered_inputs = None  # otherwise TRL reuses completions of another mask
        prepared = trainer._prepare_inputs(own_copy(batch))
        return trainer._buffered_inputs or [prepared]

    def loss(self, part: Any) -> Tensor:
        """The loss on one part, with its graph, averaged as the trainer averages it, no dropout."""
        to_evaluation(self.model)
        # transformers 5.23 checkpoints activations only in modules that are in training mode.
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        return self._compute(own_copy(part))

    def backward(self, batch: Any, *, step: int) -> float:
        """Add the gradient of the loss on `batch` to the gates; returns the loss in nats."""
        parts = self.parts(batch)
        self.num_forward += 1
        self.num_backward += 1
        total, share = 0.0, self._share(parts)
        with _summed_gradients(self.model) if self._is_shared else contextlib.nullcontext():
            for part in parts:
                loss = share * self.loss(part) / len(parts)
                total += float(loss.detach())
                loss.backward()  # not accelerator.backward, which divides by accumulation steps
        return finite(self._over_processes(total), f"mask step {step}")

    def value(self, batch: Any, *, step: int) -> float:
        """The loss on `batch` in nats, without a graph."""
        self.num_forward += 1
        with torch.no_grad():
            parts = self.parts(batch)
            total = sum(float(self.loss(part)) for part in parts) / len(parts)
        return finite(self._over_processes(self._share(parts) * total), f"mask step {step}")

    def held_out(self, batches: Sequence[Any]) -> BatchLosses:
        """The loss of each batch, with the model in evaluation mode; its modes are restored."""
        if samples(self.trainer):
            raise ConfigError(
                f"a held-out loss must be a function of the data, but "
                f"{type(self.trainer).__name__} samples completions and its loss is near zero "
                f"whatever the model; compare mean rewards"
            )
        modes = [(module, module.training) for module in self.model.modules()]
        to_evaluation(self.model)
        losses, weights = [], []
        try:
            for number, batch in enumerate(batches, start=1):
                inputs = self.trainer._prepare_inputs(own_copy(batch))
                weights.append(num_labels(inputs))
                with torch.no_grad():
                    losses.append(finite(float(self._compute(inputs)), f"batch {number}"))
        finally:
            for module, mode in modes:
                module.training = mode
        return BatchLosses(tuple(losses), tuple(weights))

    def _compute(self, inputs: Any) -> Tensor:
        with (
            self.trainer.compute_loss_context_manager(),
            without_penalty(self.model),
            without_router_loss(self.trainer, self.model),
        ):
            return self.trainer.compute_loss(self.model, inputs)

    def _share(self, parts: list[Any]) -> float:
        """The weight of this process's batch among those of all: labelled tokens, or rows."""
        own = sum(num_labels(part) for part in parts) if self._is_shared else 1.0
        return own / self._over_processes(own)

    def _over_processes(self, value: float) -> float:
        """The sum over processes, so that all see the same value, NaN included."""
        if not self._is_shared:
            return value
        return float(summed(torch.tensor(value, dtype=torch.float64)))


@contextlib.contextmanager
def _without_own_copy(trainer: Trainer) -> Iterator[None]:
    """Inside the block, use the base model as the reference if "ref" equals the update."""
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    own = {id(parameter) for parameter in model.parameters()}  # PEFT adds adapters in place
    if isinstance(reference, nn.Module) and any(id(p) in own for p in reference.parameters()):
        raise ConfigError(
            "`ref_model` must be another copy of the model, but it shares weights and adapter with "
            "the model that is ranked; load a second copy, or leave it out"
        )
    if not _is_own_copy(model):
        yield
        return
    if getattr(trainer, "precompute_ref_logps", False):
        raise ConfigError(
            "the reference must be what training started from, but its log probabilities were "
            "computed with the finished adapter; build the trainer with "
            "`precompute_ref_log_probs=False`, or give it a `ref_model`"
        )
    with restored([model.peft_config]):
        del model.peft_config[REFERENCE_ADAPTER]
        yield


def reference_of(trainer: Trainer) -> str | None:
    """The reference model's name in a record; None if the loss has no reference."""
    if not hasattr(trainer, "ref_model") or getattr(trainer, "beta", None) == 0.0:
        return None
    if trainer.ref_model is not None:
        return "ref_model"
    model = trainer.model
    has_adapter = isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config
    return f"adapter {REFERENCE_ADAPTER}" if has_adapter and not _is_own_copy(model) else "base"


def _is_own_copy(model: nn.Module) -> bool:
    """Whether the model has a reference adapter with the same weights as the active one."""
    if not isinstance(model, PeftModel) or REFERENCE_ADAPTER not in model.peft_config:
        return False
    active = model.active_adapter
    if active == REFERENCE_ADAPTER:
        return False
    tensors = dict(model.named_parameters(remove_duplicate=False))
    own = [name for name in tensors if f".{active}." in name]
    copies = [tensors.get(name.replace(f".{active}.", f".{REFERENCE_ADAPTER}.")) for name in own]
    both = zip(own, copies, strict=True)
    return all(copy is not None and torch.equal(tensors[name], copy) for name, copy in both)


@contextlib.contextmanager
def without_router_loss(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Cross-entropy alone: mixtures of experts can add a loss of their routers, also in TRL."""
    base = base_model_of(model)
    config = base.config.get_text_config() if isinstance(base, PreTrainedModel) else None
    holders = ((config, "output_router_logits"), (trainer, "aux_loss_enabled"))
    switched = [(holder, name) for holder, name in holders if getattr(holder, name, False)]
    for holder, name in switched:
        setattr(holder, name, False)
    try:
        yield
    finally:
        for holder, name in switched:
            setattr(holder, name, True)


@contextlib.contextmanager
def _summed_gradients(model: nn.Module) -> Iterator[None]:
    """Sum over processes what the block adds to the gradients of the gates."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    yield
    has_grad = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    total = summed(torch.cat([has_grad.double(), *(g.flatten().cpu().double() for g in own)]))
    grads = total[len(trained) :].split([parameter.numel() for parameter in trained])
    for parameter, old, count, grad in zip(trained, before, total, grads, strict=False):
        parameter.grad = old
        if count > 0:  # some process has a gradient
            new = grad.view_as(parameter).to(parameter.device, parameter.dtype)
            parameter.grad = new if old is None else old + new


def finite(value: float, where: str) -> float:
    """`value`, or a LossError that says where it became NaN or infinite."""
    if not math.isfinite(value):
        raise LossError(
            f"the loss must be finite, but it is {value} at {where}; check the update's weights, "
            f"lower the learning rate that made it, or load the model in float32"
        )
    return value
