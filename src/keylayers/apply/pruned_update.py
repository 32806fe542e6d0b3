# SPDX-License-Identifier: Apache-2.0
"""Write an update without the modules that were not selected, and prove what was written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.apply.prune import WEIGHTS, num_parameters, prune_adapter
from keylayers.apply.restore import prove_restored, restore_modules
from keylayers.apply.saving import copy_files
from keylayers.errors import GuardError
from keylayers.model.loading import (
    ADAPTER_FILES,
    CONFIG_FILES,
    TOKENIZER_FILES,
    Checkpoint,
    local_folder,
)
from keylayers.model.modules import base_model_of, map_modules
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.updates.adapter import tuner_layers

Kind = Literal["adapter", "checkpoint"]


@dataclass(frozen=True)
class Size:
    """How large an update is.

    Attributes:
        num_modules: Modules of the blocks that it changes.
        num_parameters: The parameters of an adapter; for a checkpoint the weights and biases of
            these modules.
        num_bytes: Size of the weights on disk.
    """

    num_modules: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class PrunedUpdate:
    """What was pruned, and its losses, means over the held-out examples.

    Attributes:
        kind: What was pruned and written.
        modules: Full names of the remaining modules, in model order.
        full: Size before.
        pruned: Size after.
        base_loss_nats: Held-out loss of the base model.
        full_loss_nats: Held-out loss with the whole update.
        pruned_loss_nats: Held-out loss of what was written, loaded again.
        num_held_out: Number of held-out examples.
        loss_unit: What a loss counts.
    """

    kind: Kind
    modules: tuple[str, ...]
    full: Size
    pruned: Size
    base_loss_nats: float
    full_loss_nats: float
    pruned_loss_nats: float
    num_held_out: int
    loss_unit: str


@dataclass(frozen=True)
class Pruning:
    """An update to prune. Holds no model.

    Attributes:
        update: Where the update is.
        base: The base model.
        selection: The modules to keep.
        pruned: The other ranked modules.
        paths: All modules that an adapter updates, including those outside the blocks, with the
            path of the PEFT layer around each; empty for a checkpoint.
        stacked: The base model's stacked experts; None if it has none.
    """

    update: UpdateOptions
    base: ModelOptions
    selection: Selection
    pruned: tuple[str, ...]
    paths: Mapping[str, str]
    stacked: frozenset[str] | None

    @classmethod
    def of(
        cls,
        update: UpdateOptions,
        base: ModelOptions,
        model: PreTrainedModel | PeftModel,
        ranking: Ranking,
        selection: Selection,
    ) -> "Pruning":
        """The pruning of the update that `model` carries, to the modules of `selection`."""
        chosen = set(selection.names)
        return cls(
            update,
            base,
            selection,
            pruned=tuple(m.name for m in ranking.modules if m.name not in chosen),
            paths=_layer_paths(model) if isinstance(model, PeftModel) else {},
            stacked=frozenset(m.name for m in map_modules(model, "all") if m.is_stacked) or None,
        )

    @property
    def kind(self) -> Kind:
        """What is pruned and written."""
        return "checkpoint" if self.update.adapter is None else "adapter"

    def write(self, folder: Path, progress: Progress) -> tuple[Size, Size]:
        """Write the pruned update to `folder` and prove its tensors; sizes before and after."""
        if self.update.adapter is not None:
            return self._write_adapter(self.update.adapter, folder)
        assert self.update.tuned is not None
        return self._write_checkpoint(self.update.tuned, folder, progress)

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

    def _write_checkpoint(self, name: str, folder: Path, progress: Progress) -> tuple[Size, Size]:
        tuned, base = Checkpoint.open(ModelOptions(model=name)), Checkpoint.open(self.base)
        endings = ("", ".weight", ".bias")  # stacked experts are parameters themselves
        parts = [f"{module}{ending}" for module in self.pruned for ending in endings]
        restored = [part for part in parts if part in tuned]
        patterns = (*CONFIG_FILES, *TOKENIZER_FILES)
        copy_files(local_folder(name, patterns, "a model"), folder, patterns)
        progress.note(f"writing {len(tuned)} tensors, {len(restored)} of them from the base")
        restore_modules(tuned.files, base, folder, restored=restored)
        written = Checkpoint.open(ModelOptions(model=str(folder)))
        prove_restored(written, base, tuned, set(restored))
        num_bytes = sum(path.stat().st_size for path in set(tuned.files.values()))
        chosen = self.selection
        return (
            Size(chosen.num_candidates, chosen.num_candidate_parameters, num_bytes),
            Size(len(chosen.modules), chosen.num_parameters, num_bytes),
        )

    def prove_targets(self, model: PeftModel) -> None:
        """Refuse a pruned adapter that PEFT does not put on exactly the modules to keep."""
        kept = self.paths.keys() - set(self.pruned)
        odd = sorted(tuner_layers(model).keys() ^ kept)
        if odd:
            raise GuardError(
                f"PEFT must put the pruned adapter on exactly the kept modules, but {len(odd)} "
                f"differ, first {odd[0]}"
            )


def prove_same_loss(loss: float, masked: float, dtype: torch.dtype) -> None:
    """Refuse an adapter that does not compute what the full one does with closed gates.

    Args:
        loss: Held-out loss in nats of the pruned adapter.
        masked: That of the full adapter with the gates of the pruned modules closed.
        dtype: The dtype of the model, which decides how far they may differ.
    """
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-3
    if not math.isclose(loss, masked, rel_tol=tolerance, abs_tol=tolerance):
        raise GuardError(
            f"the pruned adapter must compute what the full one does with the updates of the "
            f"pruned modules off, but its held-out loss is {loss} instead of {masked}"
        )


def _layer_paths(model: PeftModel) -> dict[str, str]:
    """Module name -> path of the PEFT layer around it in the base model."""
    paths = {id(layer): path for path, layer in base_model_of(model).named_modules()}
    return {name: paths[id(layer)] for name, layer in tuner_layers(model).items()}
