# SPDX-License-Identifier: Apache-2.0
"""Train only the modules that a ranking and a budget select.

The result is an ordinary PEFT adapter, or a checkpoint in which only the selected weights changed.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from keylayers.apply.adapter import prove_trainable
from keylayers.apply.freeze import prove_unchanged_elsewhere, round_to_stored, train_only
from keylayers.apply.halt import prove_kept
from keylayers.apply.saving import save_tuned
from keylayers.evaluation.loss import held_out_loss
from keylayers.memory import GIB, is_memory
from keylayers.model_map import map_modules
from keylayers.models import Checkpoint, describe, load_model, load_tokenizer, max_positions
from keylayers.options import LOSS_UNITS, Control, TrainOptions
from keylayers.progress import Progress, Silent
from keylayers.ranking import Ranking
from keylayers.records import (
    RECORD,
    check_replaceable,
    environment,
    json_sha256,
    output_folder,
    write_json,
)
from keylayers.runs.callback import FreezeUnimportant
from keylayers.runs.rank_first import train_and_freeze
from keylayers.runs.reopen import note_other_objective, objective_of, sizes_of
from keylayers.selection import Budget, Selection, check_same_modules, select
from keylayers.training.data import prepare
from keylayers.training.memory import measured_memory
from keylayers.training.objectives import prepared_examples
from keylayers.training.run import TrainingResult, fine_tune, make_trainer, new_adapter
from keylayers.verification import budget_of
from keylayers.weights import weights_sha256


@dataclass(frozen=True)
class TrainedSet:
    """One set of modules and how well it trained.

    Attributes:
        label: What the set is.
        num_modules: Its modules; 0 for the base model.
        num_trained_parameters: Numbers that were trained.
        held_out_loss_nats: Mean loss of the held-out examples: of a labelled token, or of what else
            the objective's loss is a mean over (`loss_unit` in the record).
        num_steps: Optimiser steps; 0 for the base model.
    """

    label: str
    num_modules: int
    num_trained_parameters: int
    held_out_loss_nats: float
    num_steps: int


def train(
    options: TrainOptions, output: Path, progress: Progress | None = None
) -> list[TrainedSet]:
    """Train the selected modules, prove that only they were trained, and write the result.

    Args:
        options: Everything that decides the result.
        output: Folder of the adapter or checkpoint; new, empty, or an earlier result of keylayers.
        progress: Where to report to.

    Returns:
        Held-out losses: the base model, the selection, and what it is compared with.

    Raises:
        KeylayersError: a bad option, ranking, model, data set or output; nothing is left behind
            then.
    """
    progress = progress or Silent()
    wanted = options.selection
    if wanted.ranking is None:
        check_replaceable(output)
        with output_folder(output):
            return train_and_freeze(TrainJob(options, None, progress), output)
    ranking = Ranking.load(wanted.ranking)
    budget = budget_of(wanted, ranking)
    selection = None if is_memory(budget) else select(ranking, budget)
    check_replaceable(output)
    with output_folder(output):
        job = TrainJob(options, ranking, progress)
        selection = selection or job.select_within(ranking, budget)
        if selection.num_tied_out:
            progress.note(
                f"{selection.num_tied_out} modules left out have the same score as the last one "
                f"taken; ties go by the model's order"
            )
        selected, model, result = job.train(selection.names, "selected")
        rows = [job.base_row(), selected, *job.stage_1_row(ranking)]
        record = job.record | {
            "selection": selection.record(),
            "ranking_sha256": json_sha256(ranking.to_json()),
            "losses": list(result.losses),
            "seconds": result.seconds,
        }
        job.save(model, output, record | {"results": [asdict(row) for row in rows]})
        del model
        for control in dict.fromkeys(wanted.controls):
            names = control_modules(ranking, selection, control, options.training.seed)
            rows.append(job.train(names, control)[0])
        write_json(output / RECORD, record | {"results": [asdict(row) for row in rows]})
    return rows


def control_modules(
    ranking: Ranking, selection: Selection, control: Control, seed: int
) -> tuple[str, ...]:
    """The modules of a control, in model order; as many as selected, but for `all`."""
    names = [module.name for module in ranking.modules]
    size = len(selection.modules)
    if control == "all":
        return tuple(names)
    if control == "random":
        chosen = set(random.Random(seed).sample(names, size))
    elif control == "worst":
        chosen = {module.name for module in ranking.ordered()[-size:]}
    else:
        chosen = set(names[:size] if control == "first" else names[-size:])
    return tuple(name for name in names if name in chosen)


class TrainJob:
    """What all fine-tunes of one run share: options, data, tokenizer and the base model's loss."""

    def __init__(self, options: TrainOptions, ranking: Ranking | None, progress: Progress) -> None:
        self.options = options
        self.progress = progress
        self.is_full = options.training.is_full
        # A full update changes the weights themselves, which needs their float32 values.
        self.source = replace(options.model, dtype="float32") if self.is_full else options.model
        self.objective = options.training.objective
        model = self._load()
        self.names = [info.name for info in map_modules(model, options.model.towers)]
        if ranking is not None:
            check_same_modules(ranking, sizes_of(model, ranking))
        self.tokenizer = load_tokenizer(options.model)
        positions = max_positions(model)
        self.data = prepare(options.data, self.tokenizer, positions, self.objective)
        self.data.give_template(self.tokenizer)
        for line in self.data.summary():
            progress.note(line)
        sha256 = weights_sha256(model)
        made_by = {} if ranking is None else ranking.provenance
        if made_by.get("model", {}).get("weights_sha256", sha256) != sha256:
            progress.note("the ranking was made on other weights of the same shapes")
        if ranking is not None:
            note_other_objective(ranking, self.objective, progress)
        self.record: dict[str, Any] = {
            "environment": environment(),
            "model": describe(self.source, model) | {"weights_sha256": sha256},
            "data": self.data.record(),
            "options": options.flat(),
            "loss_unit": LOSS_UNITS[self.objective],
        }
        self.stored_dtype = Checkpoint.open(self.source).dtype() if self.is_full else model.dtype
        self.base_loss_nats: float | None = None
        self._unused: PreTrainedModel | None = model

    def train(
        self, names: Sequence[str], label: str, callback: FreezeUnimportant | None = None
    ) -> tuple[TrainedSet, PreTrainedModel | PeftModel, TrainingResult]:
        """Fine-tune a fresh copy of the model on exactly `names`, or what `callback` leaves."""
        fresh = self._fresh()
        num_steps = self.options.selection.steps
        model, trainer = self._trainer(fresh, names)
        held_out = prepared_examples(trainer)["held_out"]
        if self.base_loss_nats is None:  # LoRA's update is zero at first, so this is the base model
            self.base_loss_nats = held_out_loss(trainer, held_out)
        if callback is not None:
            callback.mask_dataset = prepared_examples(trainer).get("mask")
            trainer.add_callback(callback)
        with self.progress.stage(f"training: {label}", num_steps) as on_step:
            result = fine_tune(trainer, None, on_step)
        if callback is None or callback.selection is None:
            prove_trainable(model, names)
        else:
            names = callback.selection.names
            prove_kept(model, names)
        if self.is_full:
            round_to_stored(fresh, self.stored_dtype)
        row = TrainedSet(
            label=label,
            num_modules=len(names),
            num_trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            held_out_loss_nats=held_out_loss(trainer, held_out),
            num_steps=result.num_steps,
        )
        return row, model, result

    def _trainer(
        self, fresh: PreTrainedModel, names: Sequence[str]
    ) -> tuple[PreTrainedModel | PeftModel, Trainer]:
        """A trainer of exactly `names`, and the model that it trains."""
        training, num_steps = self.options.training, self.options.selection.steps
        model: PreTrainedModel | PeftModel = fresh
        if self.is_full:
            train_only(fresh, names)
        else:
            model = new_adapter(fresh, names, training, num_steps=num_steps)
        trainer = make_trainer(
            model,
            self.tokenizer,
            self.data.train,
            training,
            num_steps=num_steps,
            evaluation=self.data.evaluation(),
            max_length=self.data.max_length,
            load_reference=self._load,
        )
        prove_trainable(model, names)
        return model, trainer

    def select_within(self, ranking: Ranking, budget: Budget) -> Selection:
        """What a budget in GiB buys, by a step of this run in which every ranked module trains."""
        names = [module.name for module in ranking.modules]
        memory = measured_memory(self._trainer(self._fresh(), names)[1])
        selection = select(ranking, budget, memory)
        chosen, whole = memory.of(selection.names) / GIB, memory.of(names) / GIB
        num_modules = len(selection.modules)
        self.progress.note(
            f"a step of {num_modules} modules holds {chosen:.3g} GiB, one of all {whole:.3g} GiB "
            f"(batches of {memory.num_rows} x {memory.num_tokens} tokens)"
        )
        self.record["step_memory_bytes"] = memory.of(selection.names)
        return selection

    def _fresh(self) -> PreTrainedModel:
        """A copy of the model that nobody has used yet."""
        fresh = self._unused or self._load()
        self._unused = None
        return fresh

    def _load(self) -> PreTrainedModel:
        return load_model(self.source, self.objective)

    def base_row(self) -> TrainedSet:
        """The base model beside the trained sets."""
        assert self.base_loss_nats is not None
        return TrainedSet("base model", 0, 0, self.base_loss_nats, 0)

    def stage_1_row(self, ranking: Ranking) -> list[TrainedSet]:
        """All modules as stage 1 of the ranking trained them, if model and data are the same."""
        made_by = ranking.provenance
        stage_1 = made_by.get("stage_1")
        is_same = objective_of(ranking) == self.objective and all(
            made_by.get(part, {}).get(key) == self.record[part][key]
            for part, key in (("model", "weights_sha256"), ("data", "split_sha256"))
        )
        if stage_1 is None or not is_same or self.is_full:
            return []
        return [
            TrainedSet(
                label="all (stage 1 of the ranking)",
                num_modules=len(ranking.modules),
                num_trained_parameters=stage_1["num_trained_parameters"],
                held_out_loss_nats=made_by["held_out_loss_nats"]["tuned"],
                num_steps=stage_1["num_steps"],
            )
        ]

    def save(
        self,
        model: PreTrainedModel | PeftModel,
        output: Path,
        record: dict[str, Any],
        beside: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write the adapter, or the checkpoint after a proof that only selected weights changed."""
        if not isinstance(model, PeftModel):
            model = model.to(self.stored_dtype)
            names = record["selection"]["modules"]
            prove_unchanged_elsewhere(model, Checkpoint.open(self.source), names)
        save_tuned(model, self.tokenizer, output, record, beside)
