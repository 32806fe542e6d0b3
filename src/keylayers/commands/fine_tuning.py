# SPDX-License-Identifier: Apache-2.0
"""Fine-tune sets of modules, each on a fresh model of one session, and save the results."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer

from keylayers.apply.trainable import prove_trainable, prove_unchanged_elsewhere, train_only
from keylayers.commands.options import Control
from keylayers.commands.repeat import card_of
from keylayers.commands.session import Session, Tuned, loss_of
from keylayers.environment import is_first_process
from keylayers.errors import RankingError
from keylayers.files import CARD, RECORD, json_sha256, replaced_folder, write_json, write_text
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.sharding import check_can_freeze_inside, is_sharded, whole
from keylayers.model.weights import is_added
from keylayers.processes import wait_for_all
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.record import TrainedSet, read_run
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.options import FreezeAction, StabilityOptions, TrainingOptions
from keylayers.training.run import TrainingResult, fine_tune, new_adapter
from keylayers.updates.adalora import is_adalora

Wanted: TypeAlias = Sequence[str] | Mapping[str, int]  # modules, or modules with LoRA ranks


@dataclass(frozen=True)
class FineTuned:
    """A trained set with its model."""

    rows: tuple[TrainedSet, ...]  # of the base model, if it was measured, and of the set
    model: Tuned
    result: TrainingResult
    inputs_sha256: str


@dataclass(frozen=True)
class FineTuning:
    """How sets of modules are trained, each with checkpoints in a folder of its own."""

    session: Session
    options: TrainingOptions
    num_steps: int  # at most
    output: Path  # of what is saved
    unfinished: Path  # holds the folders of checkpoints

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which a full fine-tune is saved: the base model's own."""
        return Checkpoint.open(self.session.source).dtype()

    def inputs_sha256(self, names: Wanted, callback: FreezeUnimportant | None = None) -> str:
        """A hash of everything that decides the result of training `names`."""
        return inputs_sha256(
            self.session,
            self.options,
            num_steps=self.num_steps,
            modules=dict(names) if isinstance(names, Mapping) else list(names),
            freeze=None if callback is None else callback.decisive(),
        )

    def trainer(self, names: Wanted, title: str) -> Trainer:
        """A trainer of exactly the modules `names` of a fresh model; loggers call it `title`."""
        model: Tuned = self.session.fresh()
        if self.options.is_full:
            train_only(model, list(names))
        else:
            model = new_adapter(model, names, self.options, num_steps=self.num_steps)
        trainer = self.session.trainer(model, self.options, self.num_steps, title)
        prove_trainable(model, names)
        return trainer

    def train(
        self,
        names: Wanted,
        label: str,
        callback: FreezeUnimportant | None = None,
        measure_base: bool = False,
    ) -> FineTuned:
        """Fine-tune exactly `names`, or the part of them that `callback` leaves trainable."""
        trainer = self.trainer(names, label)
        model = trainer.model
        if callback is not None:
            check_can_freeze_inside(trainer)  # before the base model is measured
            callback.mask_dataset = trainer.eval_dataset.get("mask")
            trainer.add_callback(callback)
        # A LoRA update is zero at first, so this is the loss of the base model.
        base = [_row(trainer, "base model", (), 0)] if measure_base else []
        inputs = self.inputs_sha256(names, callback)
        result = self.run(trainer, label, inputs, f"training {label}")
        if callback is not None and callback.frozen_at_step is not None:
            assert callback.selection is not None
            names = callback.selection.names
            label = frozen_label(label, callback.action, callback.frozen_at_step)
        prove_trainable(model, names)
        if self.options.is_full:
            _round(model, self.stored_dtype)
        rows = (*base, _row(trainer, label, list(names), result.num_steps))
        return FineTuned(rows, model, result, inputs)

    def run(
        self,
        trainer: Trainer,
        label: str,
        inputs: str,
        title: str,
        stability: StabilityOptions | None = None,
    ) -> TrainingResult:
        """Train, or continue after the last checkpoint of the same inputs."""
        progress = self.session.progress
        checkpoints = Checkpoints(self.unfinished / label, inputs, self.options.save_steps)
        if checkpoints.last is not None:
            progress.note(f"{title}: continues after step {checkpoints.last_step}")
        with progress.stage(title, self.num_steps) as on_step:
            return fine_tune(trainer, stability, on_step, checkpoints=checkpoints)

    def finished(self, inputs_sha256: str, ranking: Ranking | None) -> dict[str, Any] | None:
        """The record in the output, if it is of a training of these inputs and this ranking."""
        with suppress(RankingError):
            found = read_run(self.output / RECORD)
            is_same = ranking is None or found.ranking_sha256 == json_sha256(ranking.to_json())
            if is_same and found.inputs_sha256 == inputs_sha256:
                note = f"the training of the same inputs is taken from {self.output}"
                self.session.progress.note(note)
                return found.content
        return None

    def save(
        self, trained: FineTuned, ranking: Ranking, own: dict[str, Any], *others: TrainedSet
    ) -> dict[str, Any]:
        """Write the adapter, or the checkpoint after a proof that only selected weights changed.

        The ranking is written too if it was made inside the run. Returns the whole record, with the
        rows of the trained set and of `others`.
        """
        record = {
            **self.session.record,
            "inputs_sha256": trained.inputs_sha256,
            **own,
            "results": [row.model_dump() for row in (*trained.rows, *others)],
            "ranking_sha256": json_sha256(ranking.to_json()),
            "losses": list(trained.result.losses),
            "seconds": trained.result.seconds,
        }
        model = trained.model
        if not isinstance(model, PeftModel):
            model = model.to(self.stored_dtype)
            names = record["selection"]["modules"]
            base = Checkpoint.open(self.session.source).named_as_in(model)
            prove_unchanged_elsewhere(model, base, names)
        json_files = {FILE: ranking.to_json()} if "frozen" in own else {}
        card = card_of("train", record, ranking)
        save_tuned(model, self.session.tokenizer, self.output, record, card, json_files)
        return record

    def compare(
        self,
        record: dict[str, Any],
        ranking: Ranking,
        controls: Mapping[str, Control],
        train: Callable[[Control], FineTuned],
    ) -> list[TrainedSet]:
        """Train the controls, by label, that have no row yet, and record each; all rows."""
        rows = [TrainedSet(**row) for row in record["results"]]
        done = {row.label for row in rows}
        for label in (label for label in controls if label not in done):
            rows += train(controls[label]).rows
            record = record | {"results": [row.model_dump() for row in rows]}
            write_text(self.output / CARD, card_of("train", record, ranking))
            write_json(self.output / RECORD, record)
        return rows


def frozen_label(label: str, action: FreezeAction, step: int) -> str:
    """The label of a set whose other modules were trained only up to a step."""
    done = {"freeze": "frozen", "remove": "removed"}[action]
    return f"{label} (others {done} at step {step})"


def inputs_sha256(session: Session, options: TrainingOptions, **more: Any) -> str:
    """A hash of everything that decides the result of a training, `more` included."""
    inputs = {
        "environment": session.record["environment"],
        "model": session.record["model"],
        "split": session.record["data"]["split_sha256"],
        "training": options.decisive(),
    }
    return json_sha256(inputs | more)


def _row(trainer: Trainer, label: str, names: Sequence[str], num_steps: int) -> TrainedSet:
    """What is recorded of a model in which `names` were trained."""
    return TrainedSet(
        label=label,
        num_modules=len(names),
        num_trained_parameters=num_trained(trainer.model) if names else 0,
        held_out_loss_nats=loss_of(trainer),
        num_steps=num_steps,
    )


@torch.no_grad()
def _round(model: Tuned, dtype: torch.dtype) -> None:
    """Round all weights to the dtype that they will be stored in; their dtype stays."""
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))


def num_trained(model: Tuned) -> int:
    """The number of trainable parameters."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def save_tuned(
    model: Tuned,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Mapping[str, Any],
    card: str,
    json_files: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a PEFT model's adapter, or a whole checkpoint, all or nothing.

    The card replaces the one that PEFT writes. `json_files` maps the names of further files to
    their content. With several processes, the first one writes and the others wait.
    """
    values = _gathered(model) if is_sharded(model) else None
    if not is_first_process():
        wait_for_all()
        return
    with replaced_folder(folder) as temporary:
        with warnings.catch_warnings():
            # AdaLoRA leaves some modules no rank. PEFT mistakes their empty matrices for shards.
            if is_adalora(model):
                warnings.filterwarnings("ignore", message=".* LoRA tensor.* have invalid shape")
            model.save_pretrained(temporary, state_dict=values)
        tokenizer.save_pretrained(temporary)
        for name, content in (json_files or {}).items():
            write_json(temporary / name, content)
        write_text(temporary / CARD, card)
        write_json(temporary / RECORD, record)
    wait_for_all()


def _gathered(model: Tuned) -> dict[str, Tensor]:
    """The whole tensors to save, on the CPU of the first process; a collective call."""
    found = {}
    for name, value in model.state_dict().items():
        if is_added(name) or not isinstance(model, PeftModel):
            gathered = whole(value)
            if is_first_process():
                found[name] = gathered.cpu()
    return found
