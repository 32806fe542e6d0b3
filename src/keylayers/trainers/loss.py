# SPDX-License-Identifier: Apache-2.0
"""The trainer's own loss on the trainer's own batches, whichever trainer it is.

Nothing here knows the objective: any `transformers.Trainer`, every TRL trainer and subclasses with
their own `compute_loss` work, because gates are the only trainable parameters while masks are
learned.
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from keylayers.errors import ConfigError, DataError, LossError
from keylayers.model.preserve import to_evaluation
from keylayers.processes import is_one_of_many, summed
from keylayers.trainers.reference import without_own_copy
from keylayers.trainers.state import unchanged_trainer
from keylayers.updates.adalora import without_penalty


class TrainerLoss:
    """Batches and losses of a trainer, without its optimiser, schedule, checkpoints or log.

    Attributes:
        model: Whose loss it is: the trainer's own unless another is given.
        num_forward: Forward passes over a batch so far.
        num_backward: Backward passes over a batch so far.
        is_alone: Whether this process's losses are its own, because every process has every batch
            (`every_batch_everywhere`); otherwise those of several processes are those of one batch.
    """

    def __init__(self, trainer: Trainer, model: nn.Module | None = None) -> None:
        if getattr(trainer, "use_vllm", False):
            raise ConfigError(
                "completions must be sampled from the masked model, but vLLM holds a copy without "
                "gates; build the trainer with use_vllm=False"
            )
        self.trainer = trainer
        self.model = trainer.model if model is None else model
        self.num_forward = 0
        self.num_backward = 0
        self.is_alone = False

    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches without end, shuffled anew in each epoch by the trainer's own sampler.

        Of several processes each gets its own, unless `every_batch_everywhere`.

        A trainer that keeps its data in order gets whole batches in another order: KTO pairs each
        prompt with an answer of its neighbour in the batch.

        Args:
            seed: Of the order, in place of the trainer's; inside `quiet` alone.

        Raises:
            DataError: the trainer has no training data.
        """
        if self.trainer.train_dataset is None:
            raise DataError(
                "the trainer must have a `train_dataset` to learn a mask on, but it has none"
            )
        self._reseed(seed)
        generator = torch.Generator().manual_seed(seed)
        loader = self._loader(generator)
        epoch = 0
        while True:
            if hasattr(
                loader, "set_epoch"
            ):  # accelerate's loaders reshuffle by it, plain ones need not
                loader.set_epoch(epoch)
            num_batches = 0
            for batch in islice(loader, None, None, _num_repeats(self.trainer)):
                num_batches += 1
                yield batch
            if num_batches == 0:
                raise DataError(
                    "the trainer's data must give at least one batch, but it gives none"
                )
            epoch += 1
            loader = self._loader(generator) if self._is_in_order() else loader

    def _reseed(self, seed: int) -> None:
        """Let samplers draw by `seed`, whether accelerate seeds them or the trainer does."""
        trainer = self.trainer
        trainer.args = copy.copy(trainer.args)
        trainer.args.seed = trainer.args.data_seed = seed
        accelerator = trainer.accelerator
        accelerator.dataloader_config = replace(accelerator.dataloader_config, data_seed=seed)

    def _loader(self, generator: torch.Generator) -> DataLoader[Any]:
        trainer, dataset = self.trainer, self.trainer.train_dataset
        if self._is_in_order():
            size = trainer._train_batch_size
            trainer.train_dataset = _in_other_blocks(dataset, size, generator)
        try:
            return trainer.get_train_dataloader()
        finally:
            trainer.train_dataset = dataset

    def _is_in_order(self) -> bool:
        strategy = getattr(self.trainer.args, "train_sampling_strategy", "random")
        return strategy == "sequential" and isinstance(self.trainer.train_dataset, Dataset)

    def parts(self, batch: Any) -> list[Any]:
        """What the loss is taken on: the batch as the trainer prepares it.

        A trainer that samples generates completions of the model as it is now, with its gates, and
        never again uses old ones; it cuts them into as many parts as it would take steps on them.
        """
        trainer = self.trainer
        self.model.train()  # a sampler keeps no buffer in evaluation
        if not samples(trainer):
            return [trainer._prepare_inputs(_own_copy(batch))]
        trainer._buffered_inputs = None  # or it would go on with completions of another mask
        prepared = trainer._prepare_inputs(_own_copy(batch))
        return trainer._buffered_inputs or [prepared]

    def loss(self, part: Any) -> Tensor:
        """The loss on one part, with its graph; mean over whatever the trainer averages over.

        The model runs as in evaluation: two losses are compared that differ by their gates, and
        must not differ by what dropout drew.
        """
        _without_chance(self.model)
        with self.trainer.compute_loss_context_manager(), without_penalty(self.model):
            return self.trainer.compute_loss(self.model, _own_copy(part))

    def backward(self, batch: Any, *, step: int) -> float:
        """Add the gradient of the loss on `batch` to the gates; the loss in nats.

        Raises:
            LossError: the loss is NaN or infinite; says at which step.
        """
        parts = self.parts(batch)
        self.num_forward += 1
        self.num_backward += 1
        total, share = 0.0, self._share(parts)
        with _summed_gradients(self.model) if self._is_shared else contextlib.nullcontext():
            for part in parts:
                loss = share * self.loss(part) / len(parts)
                total += float(loss.detach())
                loss.backward()  # not accelerator.backward, which divides by accumulation steps
        return _finite(self._over_processes(total), f"mask step {step}")

    def value(self, batch: Any, *, step: int) -> float:
        """The loss on `batch` in nats, without a graph.

        Raises:
            LossError: the loss is NaN or infinite; says at which step.
        """
        self.num_forward += 1
        with torch.no_grad():
            parts = self.parts(batch)
            total = sum(float(self.loss(part)) for part in parts) / len(parts)
        return _finite(self._over_processes(self._share(parts) * total), f"mask step {step}")

    @property
    def _is_shared(self) -> bool:
        return is_one_of_many() and not self.is_alone

    def _share(self, parts: list[Any]) -> float:
        """The weight of this process's batch among those of all: labelled tokens, or rows."""
        if not self._is_shared:
            return 1.0
        own = sum(_weight(part) for part in parts)
        return own / float(summed(torch.tensor(own, dtype=torch.float64)))

    def _over_processes(self, loss: float) -> float:
        """The sum of what the processes found; each of them sees the same, a loss of NaN too."""
        if not self._is_shared:
            return loss
        return float(summed(torch.tensor(loss, dtype=torch.float64)))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Give the trainer back as it was; inside, its reference is not the update itself."""
        with unchanged_trainer(self.trainer), without_own_copy(self.trainer):
            # Some losses divide by it, and it exists only once a trainer has trained.
            self.trainer.current_gradient_accumulation_steps = 1
            yield


def _in_other_blocks(dataset: Dataset, size: int, generator: torch.Generator) -> Dataset:
    """The rows in blocks of `size` in random order, each block as it was; a shorter one last."""
    num_whole = len(dataset) // size
    blocks = torch.randperm(num_whole, generator=generator).tolist()
    order = [size * block + row for block in blocks for row in range(size)]
    return dataset.select([*order, *range(size * num_whole, len(dataset))])


def _num_repeats(trainer: Trainer) -> int:
    """How often the loader gives the same prompts in a row, for completions used that often."""
    if not samples(trainer):
        return 1
    return int(trainer.args.steps_per_generation * getattr(trainer, "num_iterations", 1))


def samples(trainer: Trainer) -> bool:
    """Whether the trainer learns from completions that it samples and rewards (GRPO, RLOO).

    Its loss is no function of its inputs, and only the loss's gradient means something.
    """
    return hasattr(trainer, "reward_funcs")


def _without_chance(model: nn.Module) -> None:
    """Evaluation mode, save for blocks that are recomputed: they do so in training mode alone."""
    to_evaluation(model)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def _own_copy(batch: Any) -> Any:
    """A batch that trainers may take columns out of: a dictionary, or a list of examples."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return [_own_copy(one) for one in batch] if isinstance(batch, list) else batch


@contextlib.contextmanager
def every_batch_everywhere(trainer: Trainer) -> Iterator[None]:
    """Inside the block, data loaders give every process all batches, as if it were the only one."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        yield
        return
    before = dict(vars(accelerator))

    def prepare(loader: DataLoader[Any], *_: Any, **__: Any) -> Any:
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            dispatch_batches=False,  # streams too: the first process would hand out parts
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
        )

    accelerator.prepare_data_loader = prepare
    try:
        yield
    finally:
        if "prepare_data_loader" in before:
            accelerator.prepare_data_loader = before["prepare_data_loader"]
        else:
            del accelerator.prepare_data_loader


@contextlib.contextmanager
def _summed_gradients(model: nn.Module) -> Iterator[None]:
    """Sum over processes what the block adds to the gradients of what is trainable: the gates."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    yield
    has_one = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    flat = [torch.zeros_like(one) if one.grad is None else one.grad for one in trained]
    total = summed(torch.cat([has_one.double(), *(one.flatten().cpu().double() for one in flat)]))
    sizes = [parameter.numel() for parameter in trained]
    for index, (parameter, grad) in enumerate(
        zip(trained, total[len(trained) :].split(sizes), strict=True)
    ):
        parameter.grad = before[index]
        if total[index] == 0:  # silent everywhere
            continue
        grad = grad.view_as(parameter).to(parameter.device, parameter.dtype)
        parameter.grad = grad if before[index] is None else before[index] + grad


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise LossError(
            f"the loss must be finite, but it is {value} at {where}; check the update's weights, "
            f"lower the learning rate that made it, or load the model in float32"
        )
    return value


@dataclass(frozen=True)
class BatchLosses:
    """Losses of several batches.

    Attributes:
        losses: Mean loss of each batch in nats.
        weights: Labelled tokens of each batch; without labels, its rows.
    """

    losses: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Weighted mean in nats: over all labelled tokens of all batches."""
        products = (loss * weight for loss, weight in zip(self.losses, self.weights, strict=True))
        return sum(products) / sum(self.weights)


def batch_losses(source: TrainerLoss, batches: list[Any]) -> BatchLosses:
    """Loss in nats of each batch; the model runs in evaluation mode and gets its mode back.

    Raises:
        ConfigError: the trainer samples its own data, so that its loss tells nothing.
        LossError: a loss is NaN or infinite; says in which batch.
    """
    model, trainer = source.model, source.trainer
    if samples(trainer):
        raise ConfigError(
            f"a held-out loss must be a function of the data, but {type(trainer).__name__} samples "
            f"completions and its loss is near zero whatever the model; compare mean rewards"
        )
    modes = [(module, module.training) for module in model.modules()]
    to_evaluation(model)
    losses, weights = [], []
    try:
        for number, batch in enumerate(batches, start=1):
            inputs = trainer._prepare_inputs(_own_copy(batch))
            weights.append(_weight(inputs))
            with (
                torch.no_grad(),
                trainer.compute_loss_context_manager(),
                without_penalty(model),
            ):
                loss = float(trainer.compute_loss(model, inputs))
                losses.append(_finite(loss, f"batch {number}"))
    finally:
        for module, mode in modes:
            module.training = mode
    return BatchLosses(tuple(losses), tuple(weights))


def counts_tokens(inputs: Any) -> bool:
    """Whether a batch has a label for each token: then the loss is a mean over labelled tokens.

    Labels of another shape (a class or a number for each row) are one for each row.
    """
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.dim() > 1 and labels.shape[-1] > 1


def _weight(inputs: dict[str, Any]) -> float:
    """How many labelled next tokens a batch holds; without a label for each token, its rows.

    A batch of pairs (DPO, reward) has two rows for each pair, or one, in every batch alike.
    """
    if counts_tokens(inputs):
        return max(1.0, float((inputs["labels"][..., 1:] != -100).sum()))
    return float(len(next(iter(inputs.values()))))
