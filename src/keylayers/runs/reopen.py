# SPDX-License-Identifier: Apache-2.0
"""Open what a ranking was made of once more: model, data and the update that was ranked."""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from keylayers.commands.run_options import PruneOptions, VerifyOptions
from keylayers.data.prepare import PreparedData, prepare
from keylayers.errors import RankingError
from keylayers.model.loading import describe, load_model, load_tokenizer, max_positions
from keylayers.model.modules import map_modules, outside_module
from keylayers.model.options import Objective, UpdateOptions
from keylayers.model.weights import weights_sha256
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import read_made_by
from keylayers.ranking.selection import check_same_modules
from keylayers.runs.update import TunedModel, existing_update
from keylayers.training.options import TrainingOptions
from keylayers.training.run import make_loss_trainer

ENOUGH_BATCHES = 20  # of held-out examples, to resample them for an interval


def note_other_objective(ranking: Ranking, objective: Objective, progress: Progress) -> None:
    """Say so where a ranking was made for another objective."""
    if objective_of(ranking) != objective:
        progress.note(
            f"the ranking was made for objective {objective_of(ranking)}, not for {objective}"
        )


def objective_of(ranking: Ranking) -> str:
    """What a ranking was made for; sft where its file is from before there was a choice."""
    return ranking.made_by.options.objective


@dataclass(frozen=True)
class Reopened:
    """A model with the update that was ranked, and data.

    Attributes:
        tuned: The model, its update, and what is known of it.
        tokenizer: The model's own.
        data: Split as the options say.
        model_record: What a record says of the base model.
    """

    tuned: TunedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model_record: dict[str, Any]


def reopen(ranking: Ranking, options: VerifyOptions | PruneOptions, progress: Progress) -> Reopened:
    """Everything loaded and checked against the ranking, before any long work.

    Raises:
        RankingError: no update to open, or one of other modules than were ranked.
        KeylayersError: a bad model, data set or update.
    """
    model, objective = options.model, options.objective.objective
    tokenizer, base = load_tokenizer(model), load_model(model, objective)
    prepared = prepare(options.data, tokenizer, max_positions(base), objective)
    prepared.give_template(tokenizer)
    for line in prepared.summary():
        progress.note(line)
    record = describe(model, base) | {"weights_sha256": weights_sha256(base)}
    _note_other_inputs(ranking, record, prepared, progress)
    note_other_objective(ranking, objective, progress)
    if options.update == UpdateOptions():
        raise RankingError(
            "the update that was ranked must be there to be masked, but the ranking names none; "
            "give `adapter` or `tuned`"
        )
    known = sizes_of(base, ranking)
    tuned = existing_update(base, options.update, progress, model.towers)
    ranked = ranking.made_by.update_sha256s
    if ranked and ranked.isdisjoint(read_made_by(tuned.record, "the update").update_sha256s):
        progress.note("the update is another one than was ranked")
    check_same_modules(ranking.modules, known)
    _check_same_update(ranking, {one.module.name for one in tuned.updates})
    return Reopened(tuned, tokenizer, prepared, record)


def sizes_of(model: PreTrainedModel, ranking: Ranking) -> dict[str, int]:
    """Module name -> number of parameters: all in blocks, and the ranked ones outside them."""
    names = {name for name, _ in model.named_modules()}
    outside = [one.name for one in ranking.modules if one.block_index is None and one.name in names]
    infos = (*map_modules(model, "all"), *(outside_module(model, name) for name in outside))
    return {info.name: info.num_parameters for info in infos}


def _check_same_update(ranking: Ranking, updated: Collection[str]) -> None:
    """Refuse an update of more or of fewer modules than were ranked."""
    names = [module.name for module in ranking.modules]
    absent = [name for name in names if name not in updated]
    if absent:
        raise RankingError(
            f"the update must be of every module of the ranking, but {len(absent)} of {len(names)} "
            f"are not updated, first {absent[0]}; give the update that was ranked, or rank this one"
        )
    unranked = [name for name in updated if name not in names]
    if unranked:
        raise RankingError(
            f"the ranking must hold every module of the update, but {len(unranked)} are missing in "
            f"it, first {min(unranked)}; rank this update"
        )


def _note_other_inputs(
    ranking: Ranking, model: dict[str, Any], data: PreparedData, progress: Progress
) -> None:
    """Say what differs from the ranking's own run, where that is known."""
    made_by = ranking.made_by
    if made_by.model.weights_sha256 not in (None, model["weights_sha256"]):
        progress.note("the ranking was made on other weights of the same shapes")
    if made_by.data.split_sha256 not in (None, data.record()["split_sha256"]):
        progress.note(
            "other data or another split than the ranking's own: held-out examples may have been "
            "seen in training"
        )


def loss_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    batch_size: int,
    options: VerifyOptions | PruneOptions,
) -> Trainer:
    """A trainer that is asked for losses, never to train.

    Args:
        model: Whose losses are wanted.
        tokenizer: The model's own.
        data: What the losses will be measured on.
        batch_size: Examples at once, at most; fewer where the held-out examples are few.
        options: Which loss, and the reference of one that has it, for a model without an adapter.
    """
    objective = options.objective.objective
    if objective != "kto":  # its loss compares the answers of a batch
        batch_size = max(1, min(batch_size, len(data.held_out) // ENOUGH_BATCHES))
    training = TrainingOptions(**asdict(options.objective), batch_size=batch_size)
    return make_loss_trainer(
        model,
        tokenizer,
        data,
        training,
        load_reference=lambda: load_model(options.model, objective),
    )
