# SPDX-License-Identifier: Apache-2.0
"""A pruning: cut an existing update to the modules that a ranking and a budget select."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from keylayers import files
from keylayers.apply.prune import (
    WEIGHTS,
    bytes_on_disk,
    num_parameters,
    prune_adapter,
    prune_checkpoint,
)
from keylayers.apply.trainable import prove_trainable
from keylayers.commands.options import CutOptions, PruneOptions, flat_values
from keylayers.commands.repeat import card_of
from keylayers.commands.session import Session, loss_of, note_ties
from keylayers.errors import ConfigError, GuardError, OutputError
from keylayers.evaluation.held_out import MaskedLoss, masked_losses, smallest_within
from keylayers.gates import part_name
from keylayers.model.loading import load_adapter, load_model
from keylayers.progress import Progress
from keylayers.ranking.budget import Count, Memory, Parameters
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import Pruned, Size
from keylayers.ranking.selection import Selection
from keylayers.scores.options import Granularity
from keylayers.training.options import LOSS_UNITS, TrainingOptions
from keylayers.training.run import fine_tune
from keylayers.updates.adapter import own_parameters, tuner_layers


def run_prune(options: PruneOptions, output: Path, progress: Progress) -> Pruned:
    """Write what is selected of an adapter or of a tuned checkpoint, and prove it."""
    ranking, wanted = Ranking.load(options.selection.ranking), options.selection
    selection = None
    if wanted.max_loss is None:
        budget = given = wanted.budget_for(ranking)
        if isinstance(given, Memory) and ranking.is_of_parts and options.update.adapter:
            budget = _within_file(given, ranking, options.update.adapter)
        selection = ranking.select(budget, rank_multiple=wanted.pad_ranks)
        selection = replace(selection, budget=str(given))
    if wanted.heal_steps and options.update.adapter is None:
        raise ConfigError(
            "`heal_steps` must be left out with `tuned`: it trains the LoRA matrices of an adapter"
        )
    files.check_replaceable(output)
    _check_apart(options, output)
    with files.output_folder(output), files.unfinished(output):
        session = Session(options, options.objective, progress, ranking=ranking)
        tuned = session.open_update(options.update, ranking)
        trainer = session.loss_trainer(tuned.model)
        held_out = trainer.eval_dataset["held_out"]
        unit: Granularity = "part" if ranking.is_of_parts else "module"  # that may be cut
        with masked_losses(trainer, tuned.updates, held_out, unit) as loss:
            if selection is None:
                selection = _smallest(wanted, loss, ranking, progress)
            title = "held-out loss of the full and the masked update"
            with progress.stage(title, 2) as on_step:
                full, masked = loss(None).mean, loss(_gates_of(selection)).mean
                on_step(2, masked)
        if selection.num_parameters == selection.num_candidate_parameters:
            progress.note("the budget keeps everything, so nothing is pruned")
        note_ties(selection, progress)
        cut = _Cut(options, session, ranking, selection)
        record = session.record | tuned.record
        kept = tuner_layers(tuned.model).keys() - set(cut.pruned)
        with files.replaced_folder(output) as folder:
            sizes = cut.write(tuned.model, folder)
            del tuned, trainer, loss  # frees the memory of the model
            with progress.stage("held-out loss of the base and the pruned model", 2) as on_step:
                if options.update.adapter is None:
                    base, pruned = cut.checkpoint_losses(folder)
                else:
                    base, pruned = cut.adapter_losses(folder, kept, masked)
                on_step(2, pruned)
            healed = cut.heal(folder, kept) if wanted.heal_steps else None
            found = Pruned(
                kind="checkpoint" if options.update.adapter is None else "adapter",
                modules=selection.names,
                full=sizes[0],
                pruned=sizes[1],
                base_loss_nats=base,
                full_loss_nats=full,
                pruned_loss_nats=pruned,
                healed_loss_nats=healed,
                num_held_out=len(session.data.held_out),
                loss_unit=LOSS_UNITS[session.objective],
            )
            record |= {
                "selection": selection.record(),
                "ranking_sha256": files.json_sha256(ranking.to_json()),
                "result": found.model_dump(exclude_none=True),
            }
            files.write_text(folder / files.CARD, card_of("prune", record, ranking))
            files.write_json(folder / files.RECORD, record)
    return found


def _within_file(budget: Memory, ranking: Ranking, adapter: str) -> Parameters:
    """A budget in MiB as a share of the parts' parameters."""
    each, of_others = bytes_on_disk(adapter)
    if budget.num_bytes <= of_others:
        raise ConfigError(
            f"`budget` must allow more than what the adapter holds besides rank-one parts, which "
            f"takes {of_others / 2**20:.3g}MiB with the file's header, got {budget}"
        )
    whole = each * sum(sum(module.part_parameters or ()) for module in ranking.modules)
    return Parameters(min(1.0, (budget.num_bytes - of_others) / whole))


def _gates_of(selection: Selection) -> list[str]:
    """The gates that stay open: of the selected modules, or of their kept parts."""
    if selection.parts is None:
        return list(selection.names)
    kept = selection.parts.items()
    return [part_name(name, index) for name, indices in kept for index in indices]


def _smallest(
    wanted: CutOptions, loss: MaskedLoss, ranking: Ranking, progress: Progress
) -> Selection:
    """The smallest selection within `max_loss` of the whole update."""
    margin, num_gates = wanted.max_loss, ranking.num_parts or len(ranking.modules)
    assert margin is not None

    def selected(count: int) -> Selection:
        return ranking.select(Count(count), rank_multiple=wanted.pad_ranks)

    def kept(count: int) -> list[str]:
        return _gates_of(selected(count))

    with progress.stage("held-out loss of smaller updates", None) as on_step:
        curve = smallest_within(loss, kept, num_gates, margin, on_step)
    best = curve.smallest_within(margin)
    what = "rank-one parts" if ranking.is_of_parts else "modules"
    how_sure = f"below {best.upper_nats:+.4f} with 95 % confidence over held-out batches"
    if len(curve.batch_weights) == 1:
        how_sure = "with unknown certainty, from a single held-out batch"
    progress.note(
        f"{len(kept(best.num_modules))} of {num_gates} {what} are enough: "
        f"{best.difference_nats:+.4f} against all, {how_sure}"
    )
    return selected(best.num_modules)


@dataclass(frozen=True)
class _Cut:
    """What is written, and the losses that prove it."""

    options: PruneOptions
    session: Session
    ranking: Ranking
    selection: Selection

    @property
    def pruned(self) -> list[str]:
        """The modules that go as a whole."""
        kept = set(self.selection.names)
        return [module.name for module in self.ranking.modules if module.name not in kept]

    def write(self, model: PreTrainedModel | PeftModel, folder: Path) -> list[Size]:
        """Write the update without the pruned modules to `folder`; its sizes before and after."""
        selection, update = self.selection, self.options.update
        if isinstance(model, PeftModel):
            source = prune_adapter(str(update.adapter), folder, model, self.pruned, selection)
            weights = (source / WEIGHTS, folder / WEIGHTS)
            parameters = [num_parameters(file) for file in weights]
            num_bytes = [file.stat().st_size for file in weights]
        else:
            tuned, restored = prune_checkpoint(
                model, str(update.tuned), self.options.model, folder, self.pruned
            )
            self.session.progress.note(
                f"wrote {len(tuned)} tensors, {len(restored)} of them from the base"
            )
            parameters = [selection.num_candidate_parameters, selection.num_parameters]
            num_bytes = [sum(path.stat().st_size for path in set(tuned.files.values()))] * 2
        counts = (selection.num_candidates, len(selection.modules))
        num_parts = (self.ranking.num_parts or None, selection.num_parts)
        return [
            Size(num_modules=count, num_parameters=numbers, num_bytes=size, num_parts=parts)
            for count, numbers, size, parts in zip(
                counts, parameters, num_bytes, num_parts, strict=True
            )
        ]

    def adapter_losses(
        self, folder: Path, kept: Collection[str], masked_loss: float
    ) -> tuple[float, float]:
        """Losses of the base and of the adapter in `folder`, as plain PEFT loads it.

        Proves that PEFT puts it on exactly the modules `kept`, and that it computes what the full
        one does with the other gates closed.
        """
        model = load_adapter(self.session.load(), str(folder))
        layers = tuner_layers(model)
        odd = sorted(layers.keys() ^ set(kept))
        if odd:
            raise GuardError(
                f"PEFT must put the pruned adapter on exactly the kept modules, but {len(odd)} "
                f"differ, first {odd[0]}"
            )
        ranks = {name: layer.r[model.active_adapter] for name, layer in layers.items()}
        for name, rank in (self.selection.ranks or {}).items():
            if ranks[name] != rank:
                raise GuardError(
                    f"PEFT must give {name} the rank of its {rank} parts, but gives {ranks[name]}"
                )
        trainer = self.session.loss_trainer(model)
        with model.disable_adapter():
            base_loss = loss_of(trainer)
        loss = loss_of(trainer)
        exact = (torch.float32, torch.float64)
        tolerance = 1e-5 if model.dtype in exact else 1e-3
        margin = tolerance
        dtypes = {value.dtype for value in load_file(folder / WEIGHTS).values()}
        if self.selection.parts is not None and not dtypes <= {*exact}:
            # The factors of the parts are rounded, and so is what they do.
            tolerance = 1e-3
            coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
            margin = max(tolerance, coarsest * abs(base_loss - masked_loss))
        if not math.isclose(loss, masked_loss, rel_tol=tolerance, abs_tol=margin):
            raise GuardError(
                f"the pruned adapter must compute what the full one does with the updates of the "
                f"pruned modules off, but its held-out loss is {loss} instead of {masked_loss}"
            )
        return base_loss, loss

    def heal(self, folder: Path, kept: Collection[str]) -> float:
        """Train the adapter in `folder` for a few steps; the held-out loss of what is stored."""
        model = load_adapter(self.session.load(), str(folder))
        for layer in tuner_layers(model).values():
            for weight in own_parameters(layer):
                weight.requires_grad_(True)
        prove_trainable(model, kept)
        wanted, objective = self.options.selection, self.options.objective
        steps, rate = wanted.heal_steps, wanted.heal_learning_rate
        training = TrainingOptions(**asdict(objective), learning_rate=rate)
        trainer = self.session.trainer(model, training, steps, "heal")
        with self.session.progress.stage("training the cut adapter", steps) as on_step:
            fine_tune(trainer, None, on_step)
        prove_trainable(model, kept)
        trained, stored = get_peft_model_state_dict(model), load_file(folder / WEIGHTS)
        for name, old in stored.items():  # PEFT holds bfloat16 adapters in float32
            stored[name] = trained[name].detach().to("cpu", old.dtype).contiguous()
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        again = load_adapter(self.session.load(), str(folder))
        return loss_of(self.session.loss_trainer(again))

    def checkpoint_losses(self, folder: Path) -> tuple[float, float]:
        """Losses of the base and of the checkpoint in `folder`, one after the other in memory."""
        base = self.session.source
        pruned = replace(base, model=str(folder), revision=None)
        base_loss, loss = (
            loss_of(self.session.loss_trainer(load_model(source, self.session.objective)))
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
