# SPDX-License-Identifier: Apache-2.0
"""What a scoring method is given: a trainer, the updates of its model, and how to look at them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer, set_seed

from keylayers.gates import Gates, gated
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, to_modules
from keylayers.scores.options import Granularity
from keylayers.trainers.batches import counts_tokens, every_batch_everywhere, samples
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import Update


@dataclass(frozen=True)
class Task:
    """The updates to score, on the trainer's own data and loss.

    Attributes:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `adapter_updates` or `dense_updates` on that model.
        seed: Seed of the order of batches and of all that the method draws.
        on_step: Called after each pass with its number, from 1, and its loss in nats.
    """

    trainer: Trainer
    updates: Sequence[Update]
    seed: int
    on_step: OnStep | None = None

    @property
    def module_names(self) -> tuple[str, ...]:
        """Full names of the modules, in the order of the updates."""
        return tuple(update.module.name for update in self.updates)

    def result(self, scores: Sequence[float], *, unit: str, **more: Any) -> ModuleScores:
        """A score for each update in order, higher is more important; `more` as ModuleScores."""
        return ModuleScores(self.module_names, tuple(scores), unit=unit, **more)

    @contextlib.contextmanager
    def masked(
        self, num_batches: int, *, granularity: Granularity = "module", looks_inside: bool = False
    ) -> Iterator["MaskedModel"]:
        """The model with gates on its updates, closed at first, and the first batches.

        When the block ends, model and trainer are as before.

        Args:
            num_batches: How many batches are drawn.
            granularity: One gate for each module, for each block, or for each projection.
            looks_inside: Whether the method sees more than losses and gradients of gates. Only
                these are averaged over processes, so each process then looks at every batch.
        """
        trainer = self.trainer
        source = TrainerLoss(trainer)
        # γ itself is the parameter: 0 is the base model and 1 the fine-tuned one.
        gates_in = gated(
            trainer.model,
            self.updates,
            initial_score=0.0,
            granularity=granularity,
            link="identity",
        )
        with gates_in as gates, source.quiet():
            set_seed(self.seed)
            source.is_alone = looks_inside
            with every_batch_everywhere(trainer) if looks_inside else contextlib.nullcontext():
                batches = list(islice(source.batches(self.seed), num_batches))
            yield MaskedModel(self, source, gates, batches)


class MaskedModel:
    """Losses and gradients of the masked model on the same few batches, at any gates.

    Attributes:
        model: The model that the gates are in.
        gates: One for each module, or for each group of modules.
        batches: What the method looks at, drawn once.
    """

    def __init__(self, task: Task, source: TrainerLoss, gates: Gates, batches: list[Any]) -> None:
        self.model = source.model
        self.gates = gates
        self.batches = batches
        self._task = task
        self._source = source
        self._losses: list[float] = []

    @property
    def loss_unit(self) -> str:
        """Unit of a difference of losses: nats only if the loss is one of tokens."""
        return "nats per token" if counts_tokens(self.batches[0]) else "the trainer's loss"

    @property
    def compares_losses(self) -> bool:
        """Whether losses at two masks can be compared: not if the trainer samples its data."""
        return not samples(self._task.trainer)

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
        self._seen(self._source.backward(batch, step=len(self._losses) + 1))
        gradient = self.gates.gradient()
        for parameter in self.gates.parameters():
            parameter.grad = None
        return gradient

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
        findings: dict[str, Any] | None = None,
    ) -> ModuleScores:
        """The scores of the gates as scores of modules, with what they cost."""
        updates = self._task.updates
        errors = standard_errors
        return self._task.result(
            to_modules(self.gates, scores, updates),
            unit=unit,
            standard_errors=None if errors is None else to_modules(self.gates, errors, updates),
            losses=tuple(self._losses),
            num_forward=self._source.num_forward,
            num_backward=self._source.num_backward,
            findings=findings or {},
        )

    def _set_gates(self, values: Float[Tensor, " gate"] | float) -> None:
        if isinstance(values, (int, float)):
            values = torch.full((len(self.gates),), values)
        self.gates.set_scores(values)

    def _seen(self, loss: float) -> float:
        self._losses.append(loss)
        if self._task.on_step is not None:
            self._task.on_step(len(self._losses), loss)
        return loss


def mean_and_error(
    shares: Float[Tensor, "batch gate"],
) -> tuple[Float[Tensor, " gate"], Float[Tensor, " gate"] | None]:
    """Mean over batches and its standard error; no error from a single batch."""
    if len(shares) < 2:
        return shares.mean(dim=0), None
    return shares.mean(dim=0), shares.std(dim=0) / len(shares) ** 0.5
