# SPDX-License-Identifier: Apache-2.0
"""One training job: sets of modules, each fine-tuned in the same way from the same model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from keylayers.apply.adapter import prove_trainable
from keylayers.apply.freeze import prove_unchanged_elsewhere, round_to_stored, train_only
from keylayers.apply.halt import prove_kept
from keylayers.apply.saving import save_tuned
from keylayers.commands.repeat import how_it_was_made
from keylayers.commands.run_options import TrainOptions
from keylayers.data.prepare import prepare
from keylayers.environment import environment, num_launched
from keylayers.errors import ConfigError
from keylayers.evaluation.loss import held_out_loss
from keylayers.files import CARD, RECORD, json_sha256, write_json, write_text
from keylayers.model.loading import Checkpoint, describe, load_model, load_tokenizer, max_positions
from keylayers.model.modules import map_modules
from keylayers.model.sharding import check_can_freeze_inside
from keylayers.model.weights import weights_sha256
from keylayers.processes import from_first
from keylayers.progress import Progress
from keylayers.ranking.budget import GIB, Budget
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection, check_same_modules
from keylayers.report.model_card import model_card
from keylayers.runs.callback import FreezeUnimportant
from keylayers.runs.reopen import note_other_objective, sizes_of
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.memory import measured_memory
from keylayers.training.objectives import prepared_examples
from keylayers.training.options import LOSS_UNITS
from keylayers.training.prefix_cache import PrefixCache
from keylayers.training.run import TrainingResult, fine_tune, make_trainer, new_adapter


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


class TrainJob:
    """What all fine-tunes of one run share: options, data, tokenizer and the base model's loss."""

    def __init__(
        self,
        options: TrainOptions,
        ranking: Ranking | None,
        progress: Progress,
        unfinished: Path,
    ) -> None:
        self.options = options
        self.progress = progress
        self.unfinished = unfinished  # checkpoints, a folder for each set
        self.is_full = options.training.is_full
        # A full update changes the weights themselves, which needs their float32 values.
        self.source = replace(options.model, dtype="float32") if self.is_full else options.model
        self.objective = options.training.objective
        model = self._load()
        self.names = [info.name for info in map_modules(model, options.model.towers)]
        if ranking is not None:
            check_same_modules(ranking.modules, sizes_of(model, ranking))
        self.tokenizer = load_tokenizer(options.model)
        positions = max_positions(model)
        self.data = prepare(options.data, self.tokenizer, positions, self.objective)
        self.data.give_template(self.tokenizer)
        for line in self.data.summary():
            progress.note(line)
        sha256 = weights_sha256(model)
        if ranking is not None and ranking.made_by.model.weights_sha256 not in (None, sha256):
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
        self,
        names: Sequence[str],
        label: str,
        callback: FreezeUnimportant | None = None,
        cache: PrefixCache | None = None,
    ) -> tuple[TrainedSet, PreTrainedModel | PeftModel, TrainingResult]:
        """Fine-tune a fresh copy of the model on exactly `names`, or what `callback` leaves."""
        fresh = self._fresh()
        num_steps = self.options.selection.steps
        model, trainer = self._trainer(fresh, names, label)
        if callback is not None:
            check_can_freeze_inside(trainer)  # the callback asks too, when training has begun
        held_out = prepared_examples(trainer)["held_out"]
        if self.base_loss_nats is None:  # LoRA's update is zero at first, so this is the base model
            self.base_loss_nats = held_out_loss(trainer, held_out)
        if callback is not None:
            callback.mask_dataset = prepared_examples(trainer).get("mask")
            trainer.add_callback(callback)
        inputs = self.inputs_sha256(names, callback)
        save_steps = self.options.training.save_steps
        checkpoints = Checkpoints(self.unfinished / label, inputs, save_steps)
        if checkpoints.last is not None:
            self.progress.note(f"training of {label} goes on after step {checkpoints.last_step}")
        with self.progress.stage(f"training: {label}", num_steps) as on_step:
            result = fine_tune(trainer, None, on_step, cache, checkpoints)
        if cache is not None:
            self._note_cache(cache)
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

    def inputs_sha256(self, names: Sequence[str], callback: FreezeUnimportant | None = None) -> str:
        """A hash of everything that decides what training on `names` gives."""
        return json_sha256(
            {
                **{part: self.record[part] for part in ("environment", "model")},
                "split": self.record["data"]["split_sha256"],
                "training": self.options.training.decisive(),
                "num_steps": self.options.selection.steps,
                "modules": list(names),
                "freeze": None if callback is None else callback.decisive(),
            }
        )

    def _trainer(
        self, fresh: PreTrainedModel, names: Sequence[str], label: str
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
            title=label.replace(" ", "-"),
        )
        prove_trainable(model, names)
        return model, trainer

    def select_within(self, ranking: Ranking, budget: Budget) -> Selection:
        """What a budget in GiB buys, by a step of this run in which every ranked module trains."""
        names = [module.name for module in ranking.modules]
        memory = measured_memory(self._trainer(self._fresh(), names, "memory")[1])
        selection = from_first(ranking.select(budget, memory))
        chosen, whole = memory.of(selection.names) / GIB, memory.of(names) / GIB
        num_modules = len(selection.modules)
        self.progress.note(
            f"a step of {num_modules} modules holds {chosen:.3g} GiB, one of all {whole:.3g} GiB "
            f"(batches of {memory.num_rows} x {memory.num_tokens} tokens)"
        )
        self.record["step_memory_bytes"] = memory.of(selection.names)
        return selection

    def prefix_cache(self, folder: Path) -> PrefixCache | None:
        """What is kept of the frozen blocks, if it was asked for.

        Raises:
            ConfigError: no example is trained on twice, or several processes share them.
        """
        wanted, training = self.options.selection, self.options.training
        if wanted.prefix_cache_gib is None:
            return None
        if num_launched() > 1:
            raise ConfigError(
                f"`prefix_cache_gib` must be left out with several processes, got "
                f"{num_launched()}: each sees other examples in each epoch"
            )
        num_seen = wanted.steps * training.batch_size * training.gradient_accumulation
        if num_seen <= len(self.data.train):
            raise ConfigError(
                f"`prefix_cache_gib` needs more than one pass over the {len(self.data.train)} "
                f"training examples, but {wanted.steps} steps take {num_seen}; leave it out, or "
                f"raise `steps`"
            )
        return PrefixCache(wanted.prefix_cache_gib, folder)

    def _note_cache(self, cache: PrefixCache) -> None:
        num_batches = cache.num_read + cache.num_computed
        self.progress.note(
            f"the {cache.num_blocks} frozen blocks were read instead of computed for "
            f"{cache.num_read} of {num_batches} batches"
        )
        self.record["prefix_cache"] = {
            "num_blocks": cache.num_blocks,
            "num_read": cache.num_read,
            "num_computed": cache.num_computed,
        }

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
        made_by = ranking.made_by
        stage_1, held_out = made_by.stage_1, made_by.held_out_loss_nats
        is_same = (
            made_by.options.objective == self.objective
            and made_by.model.weights_sha256 == self.record["model"]["weights_sha256"]
            and made_by.data.split_sha256 == self.record["data"]["split_sha256"]
        )
        if stage_1 is None or held_out is None or not is_same or self.is_full:
            return []
        return [
            TrainedSet(
                label="all (stage 1 of the ranking)",
                num_modules=len(ranking.modules),
                num_trained_parameters=stage_1.num_trained_parameters,
                held_out_loss_nats=held_out.tuned,
                num_steps=stage_1.num_steps,
            )
        ]

    def save(
        self,
        model: PreTrainedModel | PeftModel,
        output: Path,
        record: dict[str, Any],
        ranking: Ranking,
        beside: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Write the adapter, or the checkpoint after a proof that only selected weights changed."""
        if not isinstance(model, PeftModel):
            model = model.to(self.stored_dtype)
            names = record["selection"]["modules"]
            prove_unchanged_elsewhere(model, Checkpoint.open(self.source), names)
        card = model_card(record, ranking, how_it_was_made("train", record["options"], ranking))
        save_tuned(model, self.tokenizer, output, record, card, beside)

    @staticmethod
    def compare(
        output: Path,
        record: dict[str, Any],
        ranking: Ranking,
        controls: Mapping[str, Callable[[], TrainedSet]],
    ) -> list[TrainedSet]:
        """Train what the result is compared with; record and card in `output` tell of each at once.

        Args:
            output: Holds the result.
            record: Of the result, with the rows so far; those of an earlier run stay.
            ranking: What the result was selected by.
            controls: Label -> its training.

        Returns:
            All rows.
        """
        rows = [TrainedSet(**row) for row in record["results"]]
        for label, train in controls.items():
            if label in {row.label for row in rows}:
                continue
            rows.append(train())
            record = record | {"results": [asdict(row) for row in rows]}
            write_text(
                output / CARD,
                model_card(record, ranking, how_it_was_made("train", record["options"], ranking)),
            )
            write_json(output / RECORD, record)
        return rows

    def finished(self, output: Path, inputs: str, ranking: Ranking | None) -> dict[str, Any] | None:
        """The record in `output`, if it is of a training of these inputs and this ranking."""
        try:
            record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        wanted = {"inputs_sha256": inputs}
        if ranking is not None:
            wanted["ranking_sha256"] = json_sha256(ranking.to_json())
        if not isinstance(record, dict) or any(record.get(one) != wanted[one] for one in wanted):
            return None
        self.progress.note(f"the training of the same inputs is taken from {output}")
        return record
