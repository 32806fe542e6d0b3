# SPDX-License-Identifier: Apache-2.0
"""The steps of a pruning: measure the full update, write the pruned one, prove it, measure it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from keylayers.apply.prune import WEIGHTS, num_parameters, prune_adapter
from keylayers.apply.restore import prove_restored, restore_modules
from keylayers.apply.saving import copy_files
from keylayers.commands.run_options import PruneOptions
from keylayers.data.prepare import PreparedData
from keylayers.environment import environment
from keylayers.errors import GuardError
from keylayers.evaluation.loss import held_out_loss
from keylayers.evaluation.mask_curve import subset_losses
from keylayers.model.loading import (
    ADAPTER_FILES,
    CONFIG_FILES,
    TOKENIZER_FILES,
    Checkpoint,
    load_adapter,
    load_model,
    local_folder,
)
from keylayers.model.modules import base_model_of, map_modules
from keylayers.model.options import ModelOptions
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.runs.reopen import loss_trainer, reopen
from keylayers.training.objectives import prepared_examples
from keylayers.training.options import LOSS_UNITS
from keylayers.updates.adapter import tuner_layers

Kind = Literal["adapter", "checkpoint"]

EVAL_BATCH_SIZE = 8
MEASURING = "held-out loss of the base and the pruned one"


@dataclass(frozen=True)
class Size:
    """How large an update is.

    Attributes:
        num_modules: Modules of the blocks that it changes.
        num_parameters: Of an adapter its numbers, of a checkpoint the weights and biases of these
            modules.
        num_bytes: The weights on disk.
    """

    num_modules: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class PruneJob:
    """What is pruned, and what is known of the full update; its model is no longer in memory.

    Attributes:
        options: Everything that decides the result.
        selection: The modules to keep.
        pruned: The other ranked modules.
        paths: All modules that an adapter updates, those outside the blocks too -> their layers.
        stacked: The base model's stacked experts; None if it has none.
        data: Split as the options say.
        tokenizer: The base model's.
        full_loss_nats: Held-out loss with the whole update.
        masked_loss_nats: Held-out loss with the gates of the pruned modules closed.
        record: What made the result, so far.
        progress: Where to report to.
    """

    options: PruneOptions
    selection: Selection
    pruned: tuple[str, ...]
    paths: Mapping[str, str]
    stacked: frozenset[str] | None
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase
    full_loss_nats: float
    masked_loss_nats: float
    record: dict[str, Any]
    progress: Progress

    @property
    def kind(self) -> Kind:
        """What is pruned and written."""
        return "checkpoint" if self.options.update.adapter is None else "adapter"

    def write(self, folder: Path) -> tuple[Size, Size]:
        """Write the pruned update to `folder` and prove its tensors; sizes before and after."""
        update = self.options.update
        if update.adapter is not None:
            return self._write_adapter(update.adapter, folder)
        assert update.tuned is not None
        return self._write_checkpoint(update.tuned, folder)

    def measure(self, folder: Path) -> tuple[float, float]:
        """Held-out losses in nats of the base and of what is in `folder`, loaded once more."""
        if self.kind == "adapter":
            return self._measure_adapter(folder)
        return self._measure_checkpoint(folder)

    def _write_adapter(self, adapter: str, folder: Path) -> tuple[Size, Size]:
        patterns = (*ADAPTER_FILES, *TOKENIZER_FILES)
        source = local_folder(adapter, patterns, "a PEFT adapter")
        prune_adapter(source, folder, paths=self.paths, pruned=self.pruned, stacked=self.stacked)
        copy_files(source, folder, TOKENIZER_FILES)
        counts = (self.selection.num_candidates, len(self.selection.modules))
        full, pruned = (
            Size(count, num_parameters(file), file.stat().st_size)
            for count, file in zip(counts, (source / WEIGHTS, folder / WEIGHTS), strict=True)
        )
        return full, pruned

    def _measure_adapter(self, folder: Path) -> tuple[float, float]:
        """Losses of the base and of the adapter in `folder` as plain PEFT loads it."""
        with self.progress.stage(MEASURING, 2) as on_step:
            model = load_adapter(self._load(self.options.model), str(folder))
            _prove_targets(model, self._kept_targets())
            trainer = self._trainer(model)
            with model.disable_adapter():
                base_loss = _held_out_loss(trainer)
            on_step(1, base_loss)
            loss = _held_out_loss(trainer)
            on_step(2, loss)
        _prove_same_loss(loss, self.masked_loss_nats, model.dtype)
        return base_loss, loss

    def _write_checkpoint(self, name: str, folder: Path) -> tuple[Size, Size]:
        tuned, base = Checkpoint.open(ModelOptions(model=name)), Checkpoint.open(self.options.model)
        kinds = ("", ".weight", ".bias")  # stacked experts are parameters themselves
        parts = [f"{module}{kind}" for module in self.pruned for kind in kinds]
        restored = [part for part in parts if part in tuned]
        patterns = (*CONFIG_FILES, *TOKENIZER_FILES)
        copy_files(local_folder(name, patterns, "a model"), folder, patterns)
        self.progress.note(f"writing {len(tuned)} tensors, {len(restored)} of them from the base")
        restore_modules(tuned.files, base, folder, restored=restored)
        written = Checkpoint.open(ModelOptions(model=str(folder)))
        prove_restored(written, base, tuned, set(restored))
        num_bytes = sum(path.stat().st_size for path in set(tuned.files.values()))
        chosen = self.selection
        return (
            Size(chosen.num_candidates, chosen.num_candidate_parameters, num_bytes),
            Size(len(chosen.modules), chosen.num_parameters, num_bytes),
        )

    def _measure_checkpoint(self, folder: Path) -> tuple[float, float]:
        """Losses of the base and of the checkpoint in `folder`; one is in memory at a time."""
        own = replace(self.options.model, model=str(folder), revision=None)
        losses = []
        with self.progress.stage(MEASURING, 2) as on_step:
            for step, source in enumerate((self.options.model, own), start=1):
                losses.append(_held_out_loss(self._trainer(self._load(source))))
                on_step(step, losses[-1])
        return losses[0], losses[1]

    def _load(self, source: ModelOptions) -> PreTrainedModel:
        return load_model(source, self.options.objective.objective)

    def _trainer(self, model: PreTrainedModel | PeftModel) -> Trainer:
        return loss_trainer(model, self.tokenizer, self.data, EVAL_BATCH_SIZE, self.options)

    def _kept_targets(self) -> list[str]:
        return [name for name in self.paths if name not in set(self.pruned)]


def measured(
    options: PruneOptions, ranking: Ranking, selection: Selection, progress: Progress
) -> PruneJob:
    """The job, with the held-out losses of the whole update and of its kept part."""
    opened = reopen(ranking, options, progress)
    tuned, data = opened.tuned, opened.data
    every = [module.name for module in ranking.modules]
    trainer = loss_trainer(tuned.model, opened.tokenizer, data, EVAL_BATCH_SIZE, options)
    held_out = prepared_examples(trainer)["held_out"]
    subsets = [every, selection.names]
    with progress.stage("held-out loss of the full and the masked update", 2) as on_step:
        full, masked = subset_losses(trainer, tuned.updates, subsets, held_out, on_step)
    is_adapter = isinstance(tuned.model, PeftModel)
    record = {
        "environment": environment(),
        "model": opened.model_record,
        "data": data.record(),
        "options": options.flat(),
        "loss_unit": LOSS_UNITS[options.objective.objective],
    }
    return PruneJob(
        options=options,
        selection=selection,
        pruned=tuple(name for name in every if name not in set(selection.names)),
        paths=_layer_paths(tuned.model) if is_adapter else {},
        stacked=_stacked_experts(tuned.model),
        data=data,
        tokenizer=opened.tokenizer,
        full_loss_nats=full.mean,
        masked_loss_nats=masked.mean,
        record=record | tuned.record,
        progress=progress,
    )


def _layer_paths(model: PeftModel) -> dict[str, str]:
    """Module name -> path of the PEFT layer around it in the base model."""
    paths = {id(layer): path for path, layer in base_model_of(model).named_modules()}
    return {name: paths[id(layer)] for name, layer in tuner_layers(model).items()}


def _stacked_experts(model: PreTrainedModel | PeftModel) -> frozenset[str] | None:
    return frozenset(one.name for one in map_modules(model, "all") if one.is_stacked) or None


def _held_out_loss(trainer: Trainer) -> float:
    return held_out_loss(trainer, prepared_examples(trainer)["held_out"])


def _prove_targets(model: PeftModel, kept: Sequence[str]) -> None:
    """Refuse an adapter that PEFT does not put on exactly the kept modules."""
    odd = sorted(tuner_layers(model).keys() ^ set(kept))
    if odd:
        raise GuardError(
            f"PEFT must put the pruned adapter on exactly the kept modules, but {len(odd)} differ, "
            f"first {odd[0]}"
        )


def _prove_same_loss(loss: float, masked: float, dtype: torch.dtype) -> None:
    """Refuse an adapter that is not the full one with the gates of the others closed."""
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-3
    if not math.isclose(loss, masked, rel_tol=tolerance, abs_tol=tolerance):
        raise GuardError(
            f"the pruned adapter must compute what the full one does with the updates of the "
            f"pruned modules off, but its held-out loss is {loss} instead of {masked}"
        )
