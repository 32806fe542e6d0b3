# SPDX-License-Identifier: Apache-2.0
"""What a scoring method is given (a trainer, the updates of its model) and what it returns."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer, set_seed

from keylayers.errors import ModelError
from keylayers.gates import Gates, gated
from keylayers.scores.options import Granularity
from keylayers.trainers.data import loss_unit
from keylayers.trainers.log import TrainerLog
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import Update
from keylayers.updates.gate import Link


@dataclass(frozen=True)
class ModuleScores:
    """Scores of modules in model order; higher is more important.

    Attributes:
        module_names: Full names in the base model.
        scores: One for each module; modules that share a gate share the score, and a module whose
            rank-one parts have gates has their sum.
        unit: What a score counts.
        standard_errors: Standard error of each score, from the spread over batches; None if there
            are too few.
        losses: Loss of the masked model at each pass, in nats.
        num_forward: Forward passes over a batch.
        num_backward: Backward passes over a batch, for activations through frozen weights.
        findings: What else the method found, JSON-able, for the record.
        seconds: Wall time; `score_modules` measures it.
        parts: The rank-one parts of each module, if these have gates.
    """

    module_names: tuple[str, ...]
    scores: tuple[float, ...]
    _: KW_ONLY
    unit: str
    standard_errors: tuple[float, ...] | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    num_forward: int = 0
    num_backward: int = 0
    findings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    parts: tuple["PartScores", ...] | None = field(default=None, repr=False)

    @property
    def forward_equivalents(self) -> int:
        """Cost in forward passes over a batch.

        A backward pass through frozen weights counts as one: like a forward pass, it has one matrix
        product per weight.
        """
        return self.num_forward + self.num_backward


@dataclass(frozen=True)
class PartScores:
    """The rank-one parts of one module, by falling singular value."""

    scores: tuple[float, ...]
    num_parameters: tuple[int, ...]  # that each adds to an adapter


@dataclass(frozen=True)
class Task:
    """The updates to score, on the trainer's own data and loss.

    Attributes:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `adapter_updates` or `dense_updates` on that model.
        seed: Seed of the order of batches and of all that the method draws.
        log: Is told of each pass.
    """

    trainer: Trainer
    updates: Sequence[Update]
    seed: int
    log: TrainerLog

    @property
    def module_names(self) -> tuple[str, ...]:
        """Full names of the modules, in the order of the updates."""
        return tuple(update.module.name for update in self.updates)

    def blocks(self) -> list[int]:
        """The block of each update's module, for methods that score whole blocks."""
        found = []
        for module in (update.module for update in self.updates):
            if module.block_index is None:
                raise ModelError(
                    f"a method that scores blocks needs every module in a block, but {module.name} "
                    f"is in none; choose a method that scores modules, such as elimination"
                )
            found.append(module.block_index)
        return found

    def result(self, scores: Sequence[float], *, unit: str, **more: Any) -> ModuleScores:
        """A score for each update in order, higher is more important; `more` as ModuleScores."""
        return ModuleScores(self.module_names, tuple(scores), unit=unit, **more)

    @contextlib.contextmanager
    def masked(
        self,
        num_batches: int,
        *,
        granularity: Granularity = "module",
        initial_score: float = 0.0,
        link: Link = "identity",
        looks_inside: bool = False,
    ) -> Iterator["MaskedModel"]:
        """The model with gates on its updates and the first batches; restored afterwards.

        Args:
            num_batches: How many batches are drawn at once; `MaskedModel.stream` has the next.
            granularity: One gate for each module, block, projection or rank-one part.
            initial_score: Value of each gate's parameter at first.
            link: With `identity` the parameter is γ itself, 0 for the base model and 1 for the
                fine-tuned one; with `sigmoid` γ is the sigmoid of it.
            looks_inside: Whether the method sees more than losses and gradients of gates. Only
                these are averaged over processes, so each process then looks at every batch.
        """
        model = self.trainer.model
        source = TrainerLoss(self.trainer, sees_every_batch=looks_inside)
        gates_in = gated(
            model, self.updates, initial_score=initial_score, granularity=granularity, link=link
        )
        with gates_in as gates, source.quiet():
            set_seed(self.seed)
            stream = source.batches(self.seed)
            batches = list(islice(stream, num_batches))
            yield MaskedModel(gates, batches, stream, self, source)


@dataclass(eq=False)
class MaskedModel:
    """Losses and gradients of the masked model at any gates, mostly on the same few batches.

    Attributes:
        gates: One for each module, for each group of modules, or for each rank-one part.
        batches: What the method looks at, drawn once.
        stream: The batches after these, without end.
    """

    gates: Gates
    batches: list[Any]
    stream: Iterator[Any]
    _task: Task
    _source: TrainerLoss
    _losses: list[float] = field(default_factory=list)

    @property
    def costs(self) -> Float[Tensor, " gate"]:
        """What it costs to keep each gate's update: its parameters if it is a part, else 1."""
        return torch.tensor(self.gates.num_parameters or [1] * len(self.gates)).double()

    @property
    def loss_unit(self) -> str:
        """Unit of a difference of losses: nats only if the loss is one of tokens."""
        return loss_unit(self.batches[0])

    def loss(self, values: Float[Tensor, " gate"] | float, batch: Any) -> float:
        """Loss in nats on one batch with the gates at `values`."""
        self._set_gates(values)
        return self._seen(self._source.value(batch, step=len(self._losses) + 1))

    def losses(self, values: Float[Tensor, " gate"] | float) -> Float[Tensor, " batch"]:
        """Loss in nats on each batch with the gates at `values`."""
        return torch.tensor([self.loss(values, batch) for batch in self.batches])

    def gradient(
        self, values: Float[Tensor, " gate"] | float, batch: Any
    ) -> Float[Tensor, " gate"]:
        """∂L/∂γ of one batch, in nats, with the gates at `values`."""
        self._set_gates(values)
        gradient = self.backward(batch)
        for parameter in self.gates.parameters():
            parameter.grad = None
        return gradient

    def gradient_by_example(
        self, values: Float[Tensor, " gate"] | float, batch: Any
    ) -> tuple[Float[Tensor, " gate"], Float[Tensor, " gate"]]:
        """∂L/∂γ as `gradient`, and the sum over examples of the squared gradient of each one's own.

        Both come from one pass. An example is a row of the batch.
        """
        with self.gates.by_example():
            gradient = self.gradient(values, batch)
            return gradient, self.gates.squared_gradients()

    def backward(self, batch: Any) -> Float[Tensor, " gate"]:
        """Add ∂L/∂parameter of one batch to the gates' parameters as they are; returns the sums."""
        self._seen(self._source.backward(batch, step=len(self._losses) + 1))
        return self.gates.gradient()  # a guard, too: raises unless every gate took part

    def mean(self, shares: Float[Tensor, "batch gate"], *, unit: str) -> ModuleScores:
        """The mean of the batches' scores, with its standard error."""
        mean, error = mean_and_error(shares)
        return self.result(mean, unit=unit, standard_errors=error)

    def result(
        self,
        scores: Float[Tensor, " gate"],
        *,
        unit: str,
        standard_errors: Float[Tensor, " gate"] | None = None,
        findings: Mapping[str, Any] | None = None,
    ) -> ModuleScores:
        """The scores of the gates as scores of modules, with what they cost.

        Without standard errors where gates are of parts: errors of parts do not add up.
        """
        if (parts := self._parts(scores)) is not None:
            of_modules, errors = tuple(math.fsum(part.scores) for part in parts), None
        else:
            of_modules = self._to_modules(scores)
            errors = None if standard_errors is None else self._to_modules(standard_errors)
        return self._task.result(
            of_modules,
            unit=unit,
            standard_errors=errors,
            parts=parts,
            losses=tuple(self._losses),
            num_forward=self._source.num_forward,
            num_backward=self._source.num_backward,
            findings=findings or {},
        )

    def _to_modules(self, values: Float[Tensor, " gate"]) -> tuple[float, ...]:
        groups = zip(self.gates.groups.values(), values.tolist(), strict=True)
        of_module = {module: value for modules, value in groups for module in modules}
        return tuple(of_module[name] for name in self._task.module_names)

    def _parts(self, values: Float[Tensor, " gate"]) -> tuple[PartScores, ...] | None:
        if self.gates.num_parameters is None:
            return None
        sizes = [len(parameter) for parameter in self.gates.parameters()]
        rows = zip(values.tolist(), self.gates.num_parameters, strict=True)
        of_module = (list(islice(rows, size)) for size in sizes)
        return tuple(PartScores(*zip(*of_one, strict=True)) for of_one in of_module)

    def _set_gates(self, values: Float[Tensor, " gate"] | float) -> None:
        if isinstance(values, (int, float)):
            values = torch.full((len(self.gates),), values)
        self.gates.set_scores(values)

    def _seen(self, loss: float) -> float:
        self._losses.append(loss)
        self._task.log.loss(len(self._losses), loss)
        return loss


def mean_and_error(
    shares: Float[Tensor, "batch gate"],
) -> tuple[Float[Tensor, " gate"], Float[Tensor, " gate"] | None]:
    """Mean over batches and its standard error; no error from a single batch."""
    error = shares.std(dim=0) / len(shares) ** 0.5 if len(shares) > 1 else None
    return shares.mean(dim=0), error
