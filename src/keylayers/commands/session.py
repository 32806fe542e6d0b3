# SPDX-License-Identifier: Apache-2.0
"""The model, tokenizer, data and update of one run: opened once, and checked against a ranking."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from keylayers import files
from keylayers.commands.options import OpensModel, flat_values
from keylayers.data.prepare import PreparedData, prepare
from keylayers.environment import environment
from keylayers.errors import RankingError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.evaluation.verify import check_same_update
from keylayers.model import loading
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.modules import map_modules, outside_module
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.model.weights import adapter_sha256, tensors_sha256, weights_sha256
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy, read_run
from keylayers.ranking.selection import Selection, check_same_modules
from keylayers.training.options import LOSS_UNITS, ObjectiveOptions, TrainingOptions
from keylayers.training.run import make_trainer
from keylayers.updates import Update, adapter_updates, dense_updates
from keylayers.updates.adapter import always_on
from keylayers.updates.checkpoints import take_other_weights

ENOUGH_BATCHES = 20  # of held-out examples, to resample them for an interval
SPLIT = ("split_seed", "held_out", "mask_data")  # options that decide what is trained on
Tuned: TypeAlias = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class TunedModel:
    """A model with an update that gates can scale, and a record of where it came from."""

    model: Tuned
    updates: Sequence[Update]
    record: dict[str, Any]


class Session:
    """The model, tokenizer and data of one run; `record` is what a result records of it."""

    def __init__(
        self,
        options: OpensModel,
        objective: ObjectiveOptions,
        progress: Progress,
        *,
        ranking: Ranking | None = None,
        is_full: bool = False,
    ) -> None:
        """Open model, tokenizer and data, and check them before any long work.

        A ranking must be of the model's modules; `progress` gets a note of what else differs from
        its own run. With `is_full` the weights themselves are trained, which needs float32.
        """
        model = options.model
        self.source = replace(model, dtype="float32") if is_full else model
        self.objective = objective.objective
        self._objective_options = objective
        self.progress = progress
        opened = self.load()
        self.names = [info.name for info in map_modules(opened, model.towers)]
        if ranking is not None:
            check_same_modules(ranking.modules, _sizes(opened, ranking))
        self.tokenizer = loading.load_tokenizer(model)
        self.data: PreparedData = prepare(
            options.data, self.tokenizer, loading.max_positions(opened), self.objective
        )
        loading.check_tokens(
            opened, self.tokenizer, max(self.data.max_id, self.tokenizer.pad_token_id)
        )
        if self.data.chat_template is not None:  # what is saved renders chats as training did
            self.tokenizer.chat_template = self.data.chat_template.text
        for line in self.data.summary():
            progress.note(line)
        self.record: dict[str, Any] = {
            "environment": environment(),
            "model": loading.describe(self.source, opened)
            | {"weights_sha256": weights_sha256(opened)},
            "data": self.data.record(),
            "options": flat_values(options),
            "loss_unit": LOSS_UNITS[self.objective],
        }
        if ranking is not None:
            self._note_other_model(ranking)
        self._opened: PreTrainedModel | None = opened

    def load(self) -> PreTrainedModel:
        """Load the base model once more."""
        return loading.load_model(self.source, self.objective)

    def fresh(self) -> PreTrainedModel:
        """A base model that nothing else uses; the first is the one that was opened."""
        model, self._opened = self._opened, None
        return model or self.load()

    def open_update(self, options: UpdateOptions, ranking: Ranking) -> TunedModel:
        """The model with the update that was ranked."""
        made_by = ranking.made_by
        if made_by.data.split_sha256 not in (None, self.record["data"]["split_sha256"]):
            self.progress.note(
                "the data or their split differ from those of the ranking: held-out examples may "
                "have been seen in training"
            )
        if options == UpdateOptions():
            raise RankingError(
                "masking needs the update that was ranked, but the ranking names none; give "
                "`adapter` or `tuned`"
            )
        tuned = self.existing_update(options)
        check_same_update(ranking, tuned.updates)
        opened = MadeBy.model_validate(tuned.record).update_sha256s
        if made_by.update_sha256s and made_by.update_sha256s.isdisjoint(opened):
            if ranking.is_of_parts:
                raise RankingError(
                    "the update must be the one whose rank-one parts were ranked, but its weights "
                    "differ; rank this one"
                )
            self.progress.note("the update differs from the one that was ranked")
        return tuned

    def existing_update(self, options: UpdateOptions) -> TunedModel:
        """A fresh model with the adapter, or with the difference to the checkpoint, of `options`.

        `progress` gets a note about weights that are not gated.
        """
        model, towers = self.fresh(), self.source.towers
        self._note_other_split(Path(options.adapter or options.tuned or ""))
        if options.adapter is not None:
            adapted = loading.load_adapter(model, options.adapter)
            outside = always_on(adapted)
            if outside:
                self.progress.note(f"not ranked, always on: the adapter's own {', '.join(outside)}")
            sha256 = adapter_sha256(adapted)
            record = {"name": options.adapter, "weights_sha256": sha256, "always_on": outside}
            return TunedModel(adapted, adapter_updates(adapted), {"adapter": record})
        assert options.tuned is not None
        checkpoint = Checkpoint.open(ModelOptions(model=options.tuned)).named_as_in(model)
        updates = dense_updates(model, checkpoint, towers)
        others = take_other_weights(model, checkpoint, towers)
        if others:
            self.progress.note(
                f"not ranked, taken from the tuned checkpoint: {len(others)} other weights that "
                f"differ ({', '.join(others[:2])}{', ...' if len(others) > 2 else ''})"
            )
        names = (name for name, _ in model.named_parameters())
        sha256 = tensors_sha256((name, checkpoint[name]) for name in names)
        record = {"name": options.tuned, "weights_sha256": sha256}
        record["other_weights_that_differ"] = others
        return TunedModel(model, updates, {"tuned": record})

    def _note_other_split(self, update: Path) -> None:
        """Say if keylayers made the update from the same examples, split in another way."""
        try:
            made_by, own = read_run(update / files.RECORD), self.record
        except RankingError:  # made by something else
            return
        if made_by.data.content_sha256 != own["data"]["content_sha256"]:
            return
        given = made_by.options.given
        differ = [name for name in SPLIT if name in given and given[name] != own["options"][name]]
        if differ:
            were = ", ".join(f"`{name}` {given[name]}" for name in differ)
            self.progress.note(
                f"{update} was made with {were} from the same data: it may have been trained on "
                f"examples that are now held out or for the mask"
            )

    def loss_trainer(self, model: Tuned, batch_size: int = 8) -> Trainer:
        """A trainer that measures losses of `model` and never trains.

        A batch has `batch_size` examples at most, and fewer if there are few held-out examples.
        """
        if self.objective != "kto":  # its loss compares the answers of a batch
            batch_size = max(1, min(batch_size, len(self.data.held_out) // ENOUGH_BATCHES))
        objective = asdict(self._objective_options)
        return self.trainer(model, TrainingOptions(**objective, batch_size=batch_size))

    def trainer(
        self,
        model: Tuned,
        options: TrainingOptions,
        num_steps: int | None = None,
        title: str = "stage-2",
    ) -> Trainer:
        """A trainer that loggers call `title`.

        Without `num_steps` it never trains, and its data are the mask's examples, if there are any.
        """
        return make_trainer(
            model,
            self.tokenizer,
            self.data.train if num_steps else self.data.mask or self.data.train,
            options,
            num_steps=num_steps or 1,
            evaluation=self.data.evaluation(),
            max_length=self.data.max_length,
            load_reference=self.load,
            title=title,
        )

    def _note_other_model(self, ranking: Ranking) -> None:
        made_by, model = ranking.made_by, self.record["model"]
        if made_by.model.weights_sha256 not in (None, model["weights_sha256"]):
            self.progress.note("the ranking was made on other weights of the same shapes")
        if made_by.options.objective != self.objective:
            self.progress.note(
                f"the ranking was made for objective {made_by.options.objective}, not for "
                f"{self.objective}"
            )


def loss_of(trainer: Trainer) -> float:
    """The held-out loss of the model that a trainer measures."""
    return held_out_loss(trainer, trainer.eval_dataset["held_out"])


def note_ties(selection: Selection, progress: Progress) -> None:
    """Say how many modules, or parts, were left out by their place in the model alone."""
    if selection.num_tied_out:
        what = "modules" if selection.parts is None else "rank-one parts"
        progress.note(
            f"{selection.num_tied_out} {what} left out have the same score as the last one taken; "
            f"ties go by the model's order"
        )


def _sizes(model: PreTrainedModel, ranking: Ranking) -> dict[str, int]:
    """Module name -> number of parameters: all in blocks, and the ranked ones outside them."""
    names = {name for name, _ in model.named_modules()}
    outside = [
        module.name
        for module in ranking.modules
        if module.block_index is None and module.name in names
    ]
    infos = (*map_modules(model, "all"), *(outside_module(model, name) for name in outside))
    return {info.name: info.num_parameters for info in infos}
