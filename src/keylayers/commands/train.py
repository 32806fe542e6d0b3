# SPDX-License-Identifier: Apache-2.0
"""`keylayers train`: fine-tune only the modules that a ranking and a budget select."""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App

from keylayers.commands.config import FLAT, FromRanking, flat, flat_values
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.commands.selection import Control, SelectionOptions, budget_of, note_ties
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError
from keylayers.files import json_sha256
from keylayers.model.options import ModelOptions
from keylayers.progress import Progress, Silent
from keylayers.ranking.budget import GIB, Budget, Memory
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.training.options import LOSS_UNITS, StabilityOptions, TrainingOptions

if TYPE_CHECKING:
    from keylayers.commands.fine_tuning import Trained
    from keylayers.commands.train_job import TrainJob
    from keylayers.ranking.record import TrainedSet

EXAMPLES = """Examples:

```
keylayers train --ranking out --budget 0.3 --output tuned
keylayers train --ranking out --freeze 0.25 --steps 1000 --data all.jsonl
keylayers train --ranking out --budget 17 --update full --controls all random
keylayers train --rank-first --model meta-llama/Llama-3.2-1B --data chats.jsonl --steps 1000
```
"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """All options of a training run; `stability` and `scoring` are for `rank_first`."""

    selection: Annotated[SelectionOptions, flat("Selection")] = SelectionOptions()
    model: Annotated[ModelOptions, flat("Model")]
    data: Annotated[DataOptions, flat("Data")]
    training: Annotated[TrainingOptions, flat("Fine-tuning")] = TrainingOptions()
    stability: Annotated[StabilityOptions, flat("When stage 1 ends")] = StabilityOptions()
    scoring: Annotated[ScoringFlags, flat("Scoring")] = ScoringFlags()

    def __post_init__(self) -> None:
        self.selection.check()
        self.training.check_weights(self.model)
        if self.selection.rank_first:
            if self.training.is_full:
                raise ConfigError(
                    "`update` must be an adapter with `rank_first`, got full: ranking needs the "
                    "weights that a full fine-tune started from; make a ranking first with "
                    "`keylayers rank`"
                )
            self.stability.cap_within(self.selection.steps)
            return
        for part in (self.stability, self.scoring):
            for option in fields(part):
                if getattr(part, option.name) != option.default:
                    raise ConfigError(
                        f"`{option.name}` must be left out without `rank_first`: the modules are "
                        f"ranked already"
                    )


app = App(
    help_epilogue=EXAMPLES,
    help_format="markdown",
    help_formatter=FromRanking("train"),
    usage="Usage: keylayers train --ranking STR (--budget STR | --freeze FLOAT) [OPTIONS]\n"
    "       keylayers train --rank-first --model STR --data STR [OPTIONS]",
)


@app.default
def train(
    *,
    options: Annotated[TrainOptions, FLAT],
    output: Path = Path("tuned"),
    push_to_hub: str | None = None,
    private: bool = False,
    config: Path | None = None,
) -> None:
    """Train only the modules that a ranking and a budget select.

    Writes an ordinary PEFT adapter, or with --update full a checkpoint in which only the selected
    weights changed. Model, data and training options default to those of the ranking. With
    --rank-first there is no ranking yet: the run makes it and writes it to the output.

    Args:
        output: Folder of the adapter or checkpoint.
        push_to_hub: Upload the folder with model card and record to this repository of the hub, for
            example me/my-adapter.
        private: Make that repository private, if it is new.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.commands.push import prepare_push, push
    from keylayers.report.terminal import loss_table

    prepare_push(push_to_hub, private)
    rows = run(options, output, ConsoleProgress())
    console = stdout()
    console.print(loss_table(rows, LOSS_UNITS[options.training.objective]))
    kind = "checkpoint" if options.training.is_full else "adapter"
    console.print(f"\n{kind} written to {output}", markup=False)
    push(output, push_to_hub)


def run(
    options: TrainOptions, output: Path, progress: Progress | None = None
) -> "list[TrainedSet]":
    """Train the selected modules, prove that only they were trained, and write the result.

    The same call continues a run that was stopped from its last checkpoint; the result is that of a
    run that was not stopped. An error leaves nothing behind. The rows are those of the base model,
    the selection, and the controls.
    """
    from keylayers.commands.rank_first import RankFirst, train_and_freeze
    from keylayers.commands.train_job import compare, finished
    from keylayers.files import check_replaceable, output_folder, unfinished

    progress = progress or Silent()
    wanted = options.selection
    if wanted.ranking is None:
        check_replaceable(output)
        with output_folder(output), unfinished(output) as before:
            job = _open(options, output, progress, before)
            how = RankFirst(wanted, options.stability, options.scoring.scoring())
            return train_and_freeze(job, how)
    ranking = Ranking.load(wanted.ranking)
    budget = budget_of(wanted, ranking)
    selection = None if isinstance(budget, Memory) else ranking.select(budget)
    check_replaceable(output)
    with output_folder(output), unfinished(output) as before:
        job = _open(options, output, progress, before, ranking)
        if selection is None:
            selection = _select_within(job, ranking, budget)
        note_ties(selection, progress)
        record = finished(job, job.sets.inputs_sha256(selection.names), ranking)
        record = record or _train_selected(job, ranking, selection)
        controls: dict[str, Callable[[], Trained]] = {}
        for control in wanted.controls:
            names = control_modules(ranking, selection, control, options.training.seed)
            controls[control] = partial(job.sets.train, names, control)
        return compare(job, record, ranking, controls)


def _open(
    options: TrainOptions,
    output: Path,
    progress: Progress,
    unfinished: Path,
    ranking: Ranking | None = None,
) -> "TrainJob":
    """Everything loaded and checked before any training."""
    from keylayers.commands.fine_tuning import FineTuning
    from keylayers.commands.session import Session
    from keylayers.commands.train_job import TrainJob

    training, wanted = options.training, options.selection
    session = Session(
        options.model,
        options.data,
        training.objective,
        progress,
        ranking=ranking,
        is_full=training.is_full,
    )
    record = session.record | {
        "options": flat_values(options, () if wanted.rank_first else ("stability", "scoring")),
        "loss_unit": LOSS_UNITS[training.objective],
    }
    sets = FineTuning(session, training, wanted.steps, unfinished)
    return TrainJob(output, sets, record)


def _train_selected(job: "TrainJob", ranking: Ranking, selection: Selection) -> dict[str, Any]:
    """Train the selection and write it; the record of it, which is written too."""
    from keylayers.commands.train_job import base_row, save, stage_1_row

    trained = job.sets.train(selection.names, "selected", measure_base=True)
    rows = [base_row(trained.base_loss_nats), trained.row, *stage_1_row(job, ranking)]
    record = job.record | {
        "inputs_sha256": job.sets.inputs_sha256(selection.names),
        "selection": selection.record(),
        "ranking_sha256": json_sha256(ranking.to_json()),
        "losses": list(trained.result.losses),
        "seconds": trained.result.seconds,
        "results": [row.model_dump() for row in rows],
    }
    save(job, trained.model, record, ranking)
    return record


def _select_within(job: "TrainJob", ranking: Ranking, budget: Budget) -> Selection:
    """The selection of a budget in GiB, from a measured step that trains every ranked module."""
    from keylayers.processes import from_first
    from keylayers.training.memory import measured_memory

    names = [module.name for module in ranking.modules]
    memory = measured_memory(job.sets.trainer(names, "memory"))
    selection = from_first(ranking.select(budget, memory))
    held = memory.of(selection.names)
    job.progress.note(
        f"a step of {len(selection.modules)} modules holds {held / GIB:.3g} GiB "
        f"(batches of {memory.batch})"
    )
    job.record["step_memory_bytes"] = int(held)
    return selection


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
