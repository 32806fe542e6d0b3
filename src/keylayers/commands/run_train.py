# SPDX-License-Identifier: Apache-2.0
"""A training run: fine-tune only the modules that a ranking and a budget select."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from keylayers.apply.saving import save_tuned
from keylayers.apply.trainable import prove_unchanged_elsewhere
from keylayers.commands.fine_tuning import FineTuned, FineTuning
from keylayers.commands.options import Control, TrainOptions, flat_values
from keylayers.commands.repeat import card_of
from keylayers.commands.session import Session, note_ties
from keylayers.errors import RankingError
from keylayers.files import (
    CARD,
    RECORD,
    check_replaceable,
    json_sha256,
    output_folder,
    unfinished,
    write_json,
    write_text,
)
from keylayers.model.checkpoint import Checkpoint
from keylayers.processes import from_first
from keylayers.progress import Progress
from keylayers.ranking.budget import GIB, Budget, Memory
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.record import TrainedSet, read_run
from keylayers.ranking.selection import Selection
from keylayers.training.memory import measured_memory


@dataclass(frozen=True)
class TrainJob:
    """One training run: where its result goes, and what trains sets of modules."""

    output: Path
    sets: FineTuning

    @property
    def session(self) -> Session:
        """Model, tokenizer and data."""
        return self.sets.session

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
            **own,
            "results": [row.model_dump() for row in (*trained.rows, *others)],
            "ranking_sha256": json_sha256(ranking.to_json()),
            "losses": list(trained.result.losses),
            "seconds": trained.result.seconds,
        }
        model = trained.model
        if not isinstance(model, PeftModel):
            model = model.to(self.sets.stored_dtype)
            names = record["selection"]["modules"]
            prove_unchanged_elsewhere(model, Checkpoint.open(self.session.source), names)
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


@contextmanager
def open_job(
    options: TrainOptions, output: Path, progress: Progress, ranking: Ranking | None = None
) -> Iterator[TrainJob]:
    """Everything loaded and checked before any training; the output is this run's alone."""
    training, wanted = options.training, options.selection
    check_replaceable(output)
    with output_folder(output), unfinished(output) as before:
        session = Session(
            options, training.objective, progress, ranking=ranking, is_full=training.is_full
        )
        if not wanted.rank_first:  # these have no effect
            session.record["options"] = flat_values(options, without=("stability", "scoring"))
        yield TrainJob(output, FineTuning(session, training, wanted.steps, before))


def run_train(options: TrainOptions, output: Path, progress: Progress) -> list[TrainedSet]:
    """Train the selected modules, prove that only they were trained, and write the result."""
    wanted = options.selection
    assert wanted.ranking is not None
    ranking = Ranking.load(wanted.ranking)
    budget = wanted.budget_for(ranking)
    selection = None if isinstance(budget, Memory) else ranking.select(budget)
    with open_job(options, output, progress, ranking) as job:
        if selection is None:
            selection = _select_within(job, ranking, budget)
        note_ties(selection, progress)
        inputs = job.sets.inputs_sha256(selection.names)
        record = job.finished(inputs, ranking)
        if record is None:
            trained = job.sets.train(selection.names, "selected", measure_base=True)
            own = {"inputs_sha256": inputs, "selection": selection.record()}
            record = job.save(trained, ranking, own, *_stage_1_row(job, ranking))

        def train(control: Control) -> FineTuned:
            names = control_modules(ranking, selection, control, options.training.seed)
            return job.sets.train(names, control)

        return job.compare(record, ranking, {name: name for name in wanted.controls}, train)


def _select_within(job: TrainJob, ranking: Ranking, budget: Budget) -> Selection:
    """The selection of a budget in GiB, from a measured step that trains every ranked module."""
    names = [module.name for module in ranking.modules]
    memory = measured_memory(job.sets.trainer(names, "memory"))
    selection = from_first(ranking.select(budget, memory))
    held = memory.of(selection.names)
    job.session.progress.note(
        f"a step of {len(selection.modules)} modules holds {held / GIB:.3g} GiB "
        f"(batches of {memory.batch})"
    )
    job.session.record["step_memory_bytes"] = int(held)
    return selection


def _stage_1_row(job: TrainJob, ranking: Ranking) -> list[TrainedSet]:
    """All modules as stage 1 of the ranking trained them, if model and data are the same."""
    made_by = ranking.made_by
    stage_1, held_out = made_by.stage_1, made_by.held_out_loss_nats
    is_same = (
        made_by.options.objective == job.session.objective
        and made_by.model.weights_sha256 == job.session.record["model"]["weights_sha256"]
        and made_by.data.split_sha256 == job.session.record["data"]["split_sha256"]
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


def control_modules(
    ranking: Ranking, selection: Selection, control: Control, seed: int
) -> tuple[str, ...]:
    """The modules of a control, in model order; as many as selected, except for `all`."""
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
