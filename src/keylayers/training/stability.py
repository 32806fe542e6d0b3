# SPDX-License-Identifier: Apache-2.0
"""Whether the loss of a training is stable, measured on the same examples again and again.

    improvement = Σ_i w_i d_i / Σ_i w_i,    d_i = loss_i one window ago - loss_i now

Example i has the weight w_i that it has in the loss: its labelled tokens, or 1 for a loss of rows
or pairs. The loss is stable when the one-sided upper 95 % bound of the improvement is below
epsilon. The standard error is that of a ratio of sums (Cochran: "Sampling Techniques", 1977,
chapter 6), the quantile Student's. A loss that rises counts as stable: more steps would overfit.

The examples are the same every time and dropout is off, so neither the draw of the batches nor the
difficulty of examples adds noise. The bound covers other draws of the examples, not other seeds,
and it is 95 % for each measurement by itself.

Cost: a forward pass over `NUM_EXAMPLES` examples every window, one at a time, with less memory than
a training step. With the defaults and batches of 8, about 4 % of the training.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import scipy  # loads `scipy.stats` when it is first used
import trl
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer

from keylayers.model.preserve import preserved
from keylayers.processes import from_first
from keylayers.ranking.record import Measurement
from keylayers.trainers.data import prepared_for, samples
from keylayers.trainers.loss import BatchLosses, TrainerLoss
from keylayers.training.options import StabilityOptions
from keylayers.updates.adalora import is_adalora

NUM_EXAMPLES = 32
FEWEST_BATCHES = 4  # of KTO, whose unit is a batch
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Improvement:
    """How much a loss fell on the same examples, in the loss's unit."""

    mean: float
    standard_error: float
    upper: float  # one-sided, 95 %; infinite with a single example

    @staticmethod
    def between(before: BatchLosses, after: BatchLosses) -> "Improvement":
        """The paired improvement from one measurement to the next."""
        weights = np.array(after.weights)
        falls = np.array(before.losses) - np.array(after.losses)
        num, mean = len(falls), float(np.average(falls, weights=weights))
        if num < 2:
            return Improvement(mean, math.inf, math.inf)
        squares = np.square(weights * (falls - mean)).sum()
        error = math.sqrt(num / (num - 1) * squares) / float(weights.sum())
        reach = float(scipy.stats.t.ppf(CONFIDENCE, num - 1)) * error
        return Improvement(mean, error, mean + reach)


class LossHistory:
    """The measurements of a training so far, and whether the last says that its loss is stable."""

    def __init__(self, stability: StabilityOptions) -> None:
        self.stability = stability
        self.seen: tuple[Measurement, ...] = ()
        self._last: BatchLosses | None = None

    @property
    def is_stable(self) -> bool:
        """Whether the last improvement is surely below epsilon."""
        upper = self.seen[-1].upper_nats if self.seen else None
        return upper is not None and upper < self.stability.epsilon

    def add(self, step: int, losses: BatchLosses) -> None:
        """Take in the losses of the examples after a step."""
        seen = {}
        if self._last is not None:
            change = Improvement.between(self._last, losses)
            seen = {"improvement_nats": change.mean}
            if len(losses.losses) > 1:  # else nothing is known of the noise
                seen |= {"standard_error_nats": change.standard_error, "upper_nats": change.upper}
        self._last = losses
        self.seen = (*self.seen, Measurement(step=step, loss_nats=losses.mean, **seen))

    def state(self) -> dict[str, Any]:
        """All of it as JSON for a checkpoint."""
        last = None if self._last is None else asdict(self._last)
        return {"measurements": [each.model_dump() for each in self.seen], "last": last}

    def record(self) -> dict[str, Any]:
        """What a result records: the cost, and every measurement."""
        num = 0 if self._last is None else len(self._last.losses)
        return {
            "num_measured": num,
            "num_forward": num * len(self.seen),
            "measurements": [each.model_dump() for each in self.seen],
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint's `state`."""
        self.seen = tuple(Measurement.model_validate(each) for each in saved["measurements"])
        last = saved["last"]
        self._last = last and BatchLosses(tuple(last["losses"]), tuple(last["weights"]))


class StabilityWatch:
    """Measures the loss of a trainer's model every window of steps, and leaves no trace.

    Attributes:
        history: What was seen.
    """

    def __init__(
        self, trainer: Trainer, stability: StabilityOptions, dataset: Dataset | None = None
    ) -> None:
        """Measure on a part of `dataset`, by default of the trainer's own training data."""
        self.history = LossHistory(stability)
        self._trainer = trainer
        self._dataset = dataset
        self._batches: Sequence[Any] = ()

    def see(self, step: int) -> bool:
        """Measure after `step` if it is time; returns whether the loss is stable."""
        rule = self.history.stability
        is_due = step % rule.window == 0 and step >= first_step(self._trainer)
        # A sampled loss is no function of the data, and nothing is below 0 nats.
        if not is_due or rule.epsilon == 0 or samples(self._trainer):
            return False
        self.history.add(step, from_first(self._measured()))
        return self.history.is_stable

    def _measured(self) -> BatchLosses:
        source = TrainerLoss(self._trainer, sees_every_batch=True)
        with preserved(self._trainer.model):
            data = self._trainer.train_dataset
            if not self._batches and self._dataset is not None:
                data = prepared_for(self._trainer, self._dataset)
            with source.quiet():
                if not self._batches:
                    self._batches = list(self._read(data))
                return source.held_out(self._batches)

    def _read(self, dataset: Any) -> Iterator[Any]:
        """Batches of one example, but of whole batches where a loss compares neighbours (KTO)."""
        args = copy.copy(self._trainer.args)
        size, num = 1, NUM_EXAMPLES
        if isinstance(self._trainer, trl.KTOTrainer):
            size = args.per_device_train_batch_size
            num = max(FEWEST_BATCHES, NUM_EXAMPLES // size)
        self._trainer.args = args  # `quiet` gives the old ones back
        args.per_device_eval_batch_size = size
        if isinstance(dataset, Dataset):  # files are often sorted: take rows from everywhere
            wanted = min(num * size, len(dataset))
            dataset = dataset.select([len(dataset) * row // wanted for row in range(wanted)])
        loader: DataLoader[Any] = self._trainer.get_eval_dataloader(dataset)
        return islice(loader, num)


def first_step(trainer: Trainer) -> int:
    """The first step that may be measured: after warm-up, and after AdaLoRA has cut its ranks."""
    start = int(trainer.args.get_warmup_steps(trainer.state.max_steps))
    if is_adalora(trainer.model):
        config = trainer.model.active_peft_config
        start = max(start, config.total_step - config.tfinal)
    return start
