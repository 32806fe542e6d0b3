# SPDX-License-Identifier: Apache-2.0
"""A pruning: cut an existing update to the modules that a ranking and a budget select."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from keylayers.apply.prune import WEIGHTS, num_parameters, prune_adapter, prune_checkpoint
from keylayers.commands.options import PruneOptions, flat_values
from keylayers.commands.repeat import card_of
from keylayers.commands.session import Session, loss_of, note_ties
from keylayers.errors import GuardError, OutputError
from keylayers.evaluation.held_out import subset_losses
from keylayers.files import (
    CARD,
    RECORD,
    check_replaceable,
    json_sha256,
    output_folder,
    replaced_folder,
    unfinished,
    write_json,
    write_text,
)
from keylayers.model.loading import load_adapter, load_model
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import Pruned, Size
from keylayers.ranking.selection import Selection
from keylayers.training.options import LOSS_UNITS
from keylayers.updates.adapter import tuner_layers
from keylayers.updates.existing import TunedModel

EVAL_BATCH_SIZE = 8


def run_prune(options: PruneOptions, output: Path, progress: Progress) -> Pruned:
    """Write an adapter or a tuned checkpoint with only the selected modules, and prove it."""
    ranking = Ranking.load(options.selection.ranking)
    selection = ranking.select(options.selection.budget_for(ranking))
    check_replaceable(output)
    _check_apart(options, output)
    if len(selection.modules) == selection.num_candidates:
        progress.note("the budget keeps every module, so nothing is pruned")
    note_ties(selection, progress)
    objective = options.objective.objective
    with output_folder(output), unfinished(output):
        session = Session(options, objective, progress, ranking=ranking)
        tuned = session.open_update(options.update, ranking)
        pruned = [m.name for m in ranking.modules if m.name not in selection.names]
        cut = _Cut(options, session, selection, pruned)
        full, masked = cut.full_and_masked_loss(tuned)
        record = session.record | tuned.record
        kept = tuner_layers(tuned.model).keys() - set(pruned)
        with replaced_folder(output) as folder:
            sizes = cut.write(tuned.model, folder)
            del tuned  # frees the memory of its model
            with progress.stage("held-out loss of the base and the pruned model", 2) as on_step:
                if options.update.adapter is None:
                    base, loss = cut.checkpoint_losses(folder)
                else:
                    base, loss = cut.adapter_losses(folder, kept, masked)
                on_step(2, loss)
            found = Pruned(
                kind="checkpoint" if options.update.adapter is None else "adapter",
                modules=selection.names,
                full=sizes[0],
                pruned=sizes[1],
                base_loss_nats=base,
                full_loss_nats=full,
                pruned_loss_nats=loss,
                num_held_out=len(session.data.held_out),
                loss_unit=LOSS_UNITS[objective],
            )
            record |= {
                "selection": selection.record(),
                "ranking_sha256": json_sha256(ranking.to_json()),
                "result": found.model_dump(),
            }
            write_text(folder / CARD, card_of("prune", record, ranking))
            write_json(folder / RECORD, record)
    return found


@dataclass(frozen=True)
class _Cut:
    """What is written, and the losses that prove it."""

    options: PruneOptions
    session: Session
    selection: Selection
    pruned: Sequence[str]  # the modules that go

    def trainer(self, model: PreTrainedModel | PeftModel) -> Trainer:
        """A trainer that measures the loss of `model`."""
        return self.session.loss_trainer(model, self.options.objective, EVAL_BATCH_SIZE)

    def full_and_masked_loss(self, tuned: TunedModel) -> tuple[float, float]:
        """Held-out losses of the whole update, and with the gates of the pruned modules closed."""
        trainer = self.trainer(tuned.model)
        subsets = [[update.module.name for update in tuned.updates], self.selection.names]
        held_out = trainer.eval_dataset["held_out"]
        title = "held-out loss of the full and the masked update"
        with self.session.progress.stage(title, 2) as on_step:
            full, masked = subset_losses(trainer, tuned.updates, subsets, held_out, on_step)
        return full.mean, masked.mean

    def write(self, model: PreTrainedModel | PeftModel, folder: Path) -> list[Size]:
        """Write the update without the pruned modules to `folder`; its sizes before and after."""
        selection, update = self.selection, self.options.update
        if isinstance(model, PeftModel):
            source = prune_adapter(str(update.adapter), folder, model, self.pruned)
            weights = (source / WEIGHTS, folder / WEIGHTS)
            parameters = [num_parameters(file) for file in weights]
            num_bytes = [file.stat().st_size for file in weights]
        else:
            tuned, restored = prune_checkpoint(
                str(update.tuned), self.options.model, folder, self.pruned
            )
            self.session.progress.note(
                f"wrote {len(tuned)} tensors, {len(restored)} of them from the base"
            )
            parameters = [selection.num_candidate_parameters, selection.num_parameters]
            num_bytes = [sum(path.stat().st_size for path in set(tuned.files.values()))] * 2
        counts = (selection.num_candidates, len(selection.modules))
        return [
            Size(num_modules=count, num_parameters=numbers, num_bytes=size)
            for count, numbers, size in zip(counts, parameters, num_bytes, strict=True)
        ]

    def adapter_losses(
        self, folder: Path, kept: Collection[str], masked_loss: float
    ) -> tuple[float, float]:
        """Losses of the base and of the adapter in `folder`, as plain PEFT loads it.

        Proves that PEFT puts it on exactly the modules `kept`, and that it computes what the full
        one does with the other gates closed.
        """
        model = load_adapter(self.session.load(), str(folder))
        odd = sorted(tuner_layers(model).keys() ^ set(kept))
        if odd:
            raise GuardError(
                f"PEFT must put the pruned adapter on exactly the kept modules, but {len(odd)} "
                f"differ, first {odd[0]}"
            )
        trainer = self.trainer(model)
        with model.disable_adapter():
            base_loss = loss_of(trainer)
        loss = loss_of(trainer)
        tolerance = 1e-5 if model.dtype in (torch.float32, torch.float64) else 1e-3
        if not math.isclose(loss, masked_loss, rel_tol=tolerance, abs_tol=tolerance):
            raise GuardError(
                f"the pruned adapter must compute what the full one does with the updates of the "
                f"pruned modules off, but its held-out loss is {loss} instead of {masked_loss}"
            )
        return base_loss, loss

    def checkpoint_losses(self, folder: Path) -> tuple[float, float]:
        """Losses of the base and of the checkpoint in `folder`, one after the other in memory."""
        base = self.session.source
        pruned = replace(base, model=str(folder), revision=None)
        base_loss, loss = (
            loss_of(self.trainer(load_model(source, self.session.objective)))
            for source in (base, pruned)
        )
        return base_loss, loss


def _check_apart(options: PruneOptions, output: Path) -> None:
    """Refuse an output that would replace what is read."""
    for name, value in flat_values(options).items():
        is_read = name in ("ranking", "adapter", "tuned", "model", "data") and value is not None
        path = Path(str(value)).resolve()
        if is_read and path.exists() and output.resolve() in (path, *path.parents):
            raise OutputError(
                f"the output must lie apart from what is read, but `{name}` {value!r} is in "
                f"{str(output)!r}; choose another folder"
            )
