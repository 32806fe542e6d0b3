# SPDX-License-Identifier: Apache-2.0
"""What every scoring method that reads data needs: batches, gates, and losses at chosen gates.

The gates are plain factors here (γ itself, not its sigmoid), so 0 is the base model and 1 the
fine-tuned one.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer, set_seed

from keylayers.gates import Gates, gated
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, to_modules
from keylayers.trainers.loss import (
    TrainerLoss,
    counts_tokens,
    every_batch_everywhere,
    samples,
)
from keylayers.updates import Update


class Scoring:
    """Losses and gradients of the masked model on the same few batches, at any gates.

    Attributes:
        gates: One for each module, or for each group of modules.
        batches: What the method looks at, drawn once.
    """

    def __init__(
        self,
        source: TrainerLoss,
        updates: Sequence[Update],
        gates: Gates,
        batches: list[Any],
        on_step: OnStep | None,
    ) -> None:
        self.source = source
        self.updates = updates
        self.gates = gates
        self.batches = batches
        self._on_step = on_step
        self._losses: list[float] = []
        self._start = time.perf_counter()

    @property
    def loss_unit(self) -> str:
        """What a difference of losses counts: nats only where the loss is one of tokens."""
        return "nats per token" if counts_tokens(self.batches[0]) else "the trainer's loss"

    @property
    def compares_losses(self) -> bool:
        """Whether the loss at two masks can be compared: not where the trainer samples its data."""
        return not samples(self.source.trainer)

    def open(self, values: Float[Tensor, " gate"] | float) -> None:
        """Set the gates: one value for all, or one each."""
        if isinstance(values, float):
            values = torch.full((len(self.gates),), values)
        self.gates.set_scores(values)

    def loss(self, values: Float[Tensor, " gate"] | float, batch: Any) -> float:
        """Loss in nats on one batch with the gates at `values`."""
        self.open(values)
        return self._seen(self.source.value(batch, step=len(self._losses) + 1))

    def losses(self, values: Float[Tensor, " gate"] | float) -> Float[Tensor, " batch"]:
        """Loss in nats on each batch with the gates at `values`."""
        return torch.tensor([self.loss(values, batch) for batch in self.batches])

    def gradient(
        self, values: Float[Tensor, " gate"] | float, batch: Any
    ) -> Float[Tensor, " gate"]:
        """∂L/∂γ of one batch, in nats, with the gates at `values`."""
        self.open(values)
        self._seen(self.source.backward(batch, step=len(self._losses) + 1))
        gradient = self.gates.gradient()
        for parameter in self.gates.parameters():
            parameter.grad = None
        return gradient

    def result(
        self,
        scores: Float[Tensor, " gate"],
        *,
        unit: str,
        standard_errors: Float[Tensor, " gate"] | None = None,
        findings: Mapping[str, Any] | None = None,
    ) -> ModuleScores:
        """The scores of the gates as scores of modules, with what they cost."""
        errors = None
        if standard_errors is not None:
            errors = to_modules(self.gates, standard_errors, self.updates)
        return ModuleScores(
            module_names=tuple(update.module.name for update in self.updates),
            scores=to_modules(self.gates, scores, self.updates),
            standard_errors=errors,
            unit=unit,
            losses=tuple(self._losses),
            seconds=time.perf_counter() - self._start,
            num_forward=self.source.num_forward,
            num_backward=self.source.num_backward,
            findings=findings or {},
        )

    def _seen(self, loss: float) -> float:
        self._losses.append(loss)
        if self._on_step is not None:
            self._on_step(len(self._losses), loss)
        return loss


@contextlib.contextmanager
def scoring(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
    *,
    num_batches: int | None = None,
    looks_inside: bool = False,
) -> Iterator[Scoring]:
    """The trainer's model with gates on `updates`, closed at first, and its first batches.

    Everything is given back as it was when the block ends.

    Args:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `adapter_updates` or `dense_updates` on that model.
        options: How to score.
        on_step: Called after each pass with its number, from 1, and its loss in nats.
        num_batches: How many batches; `options.mask_batches` if not given.
        looks_inside: Whether the method sees more than losses and gradients of gates. Only these
            are averaged over processes, so that each of them then looks at every batch.
    """
    source = TrainerLoss(trainer)
    gates_in = gated(
        trainer.model,
        updates,
        initial_score=0.0,
        granularity=options.granularity,
        link="identity",
    )
    with gates_in as gates, source.quiet():
        seed = trainer.args.seed if options.mask_seed is None else options.mask_seed
        set_seed(seed)
        source.is_alone = looks_inside
        with every_batch_everywhere(trainer) if looks_inside else contextlib.nullcontext():
            batches = list(islice(source.batches(seed), num_batches or options.mask_batches))
        yield Scoring(source, updates, gates, batches, on_step)


def mean_and_error(
    shares: Float[Tensor, "batch gate"],
) -> tuple[Float[Tensor, " gate"], Float[Tensor, " gate"] | None]:
    """Mean over batches and its standard error; no error from a single batch."""
    if len(shares) < 2:
        return shares.mean(dim=0), None
    return shares.mean(dim=0), shares.std(dim=0) / len(shares) ** 0.5
