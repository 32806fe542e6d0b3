# SPDX-License-Identifier: Apache-2.0
"""The files of one training run: record and card, whether it is finished, rows of its controls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.apply.saving import save_tuned
from keylayers.apply.trainable import prove_unchanged_elsewhere
from keylayers.commands.fine_tuning import FineTuning, Trained
from keylayers.commands.repeat import how_it_was_made
from keylayers.commands.session import Session
from keylayers.errors import RankingError
from keylayers.files import CARD, RECORD, json_sha256, write_json, write_text
from keylayers.model.loading import Checkpoint
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import TrainedSet, read_run
from keylayers.report.model_card import model_card


@dataclass(frozen=True)
class TrainJob:
    """One training run.

    Attributes:
        output: Folder of the adapter or checkpoint.
        sets: Trains sets of modules.
        record: What the result records, so far.
    """

    output: Path
    sets: FineTuning
    record: dict[str, Any]

    @property
    def session(self) -> Session:
        """Model, tokenizer and data."""
        return self.sets.session

    @property
    def progress(self) -> Progress:
        """Where to report to."""
        return self.session.progress


def finished(job: TrainJob, inputs_sha256: str, ranking: Ranking | None) -> dict[str, Any] | None:
    """The record in the output, if it is of a training of these inputs and this ranking."""
    try:
        found = read_run(job.output / RECORD)
    except RankingError:
        return None
    is_of_ranking = ranking is None or found.ranking_sha256 == json_sha256(ranking.to_json())
    if found.inputs_sha256 != inputs_sha256 or not is_of_ranking:
        return None
    job.progress.note(f"the training of the same inputs is taken from {job.output}")
    return found.content


def save(
    job: TrainJob,
    model: PreTrainedModel | PeftModel,
    record: dict[str, Any],
    ranking: Ranking,
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the adapter, or the checkpoint after a proof that only selected weights changed."""
    if not isinstance(model, PeftModel):
        model = model.to(job.sets.stored_dtype)
        names = record["selection"]["modules"]
        prove_unchanged_elsewhere(model, Checkpoint.open(job.session.source), names)
    save_tuned(model, job.session.tokenizer, job.output, record, _card(record, ranking), files)


def compare(
    job: TrainJob,
    record: dict[str, Any],
    ranking: Ranking,
    controls: Mapping[str, Callable[[], Trained]],
) -> list[TrainedSet]:
    """Train the controls; record and card are updated after each.

    Args:
        job: Its output holds the result.
        record: The record of the result; rows of an earlier run are not trained again.
        ranking: The ranking that selected the result.
        controls: Label -> its training.

    Returns:
        All rows.
    """
    rows = [TrainedSet(**row) for row in record["results"]]
    for label, train in controls.items():
        if label in {row.label for row in rows}:
            continue
        rows.append(train().row)
        record = record | {"results": [row.model_dump() for row in rows]}
        write_text(job.output / CARD, _card(record, ranking))
        write_json(job.output / RECORD, record)
    return rows


def base_row(loss_nats: float) -> TrainedSet:
    """The row of the base model."""
    return TrainedSet(
        label="base model",
        num_modules=0,
        num_trained_parameters=0,
        held_out_loss_nats=loss_nats,
        num_steps=0,
    )


def stage_1_row(job: TrainJob, ranking: Ranking) -> list[TrainedSet]:
    """All modules as stage 1 of the ranking trained them, if model and data are the same."""
    made_by = ranking.made_by
    stage_1, held_out = made_by.stage_1, made_by.held_out_loss_nats
    is_same = (
        made_by.options.objective == job.session.objective
        and made_by.model.weights_sha256 == job.record["model"]["weights_sha256"]
        and made_by.data.split_sha256 == job.record["data"]["split_sha256"]
    )
    is_full = job.sets.options.is_full
    if stage_1 is None or held_out is None or not is_same or is_full:
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


def _card(record: Mapping[str, Any], ranking: Ranking) -> str:
    return model_card(record, ranking, how_it_was_made("train", record["options"], ranking))
