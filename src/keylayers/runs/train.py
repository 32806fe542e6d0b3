# SPDX-License-Identifier: Apache-2.0
"""Train only the modules that a ranking and a budget select.

The result is an ordinary PEFT adapter, or a checkpoint in which only the selected weights changed.
"""

import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keylayers.commands.run_options import TrainOptions
from keylayers.commands.selection import Control, budget_of
from keylayers.files import check_replaceable, json_sha256, output_folder, unfinished
from keylayers.progress import Progress, Silent
from keylayers.ranking.budget import Memory
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.runs.rank_first import train_and_freeze
from keylayers.runs.train_job import TrainedSet, TrainJob


def train(
    options: TrainOptions, output: Path, progress: Progress | None = None
) -> list[TrainedSet]:
    """Train the selected modules, prove that only they were trained, and write the result.

    A run that was stopped goes on at its last checkpoint when it is called again, and ends as if it
    had not been stopped.

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
        with output_folder(output), unfinished(output) as before:
            return train_and_freeze(TrainJob(options, None, progress, before), output)
    ranking = Ranking.load(wanted.ranking)
    budget = budget_of(wanted, ranking)
    selection = None if isinstance(budget, Memory) else ranking.select(budget)
    check_replaceable(output)
    with output_folder(output), unfinished(output) as before:
        job = TrainJob(options, ranking, progress, before)
        selection = selection or job.select_within(ranking, budget)
        if selection.num_tied_out:
            progress.note(
                f"{selection.num_tied_out} modules left out have the same score as the last one "
                f"taken; ties go by the model's order"
            )
        inputs = job.inputs_sha256(selection.names)
        record = job.finished(output, inputs, ranking) or _train(job, output, ranking, selection)
        controls: dict[str, Callable[[], TrainedSet]] = {
            control: _control(job, control, ranking, selection) for control in wanted.controls
        }
        return job.compare(output, record, ranking, controls)


def _train(job: TrainJob, output: Path, ranking: Ranking, selection: Selection) -> dict[str, Any]:
    """Train the selection and write it; its record, which is written too."""
    cache = job.prefix_cache(output.parent)
    selected, model, result = job.train(selection.names, "selected", cache=cache)
    rows = [job.base_row(), selected, *job.stage_1_row(ranking)]
    record = job.record | {
        "inputs_sha256": job.inputs_sha256(selection.names),
        "selection": selection.record(),
        "ranking_sha256": json_sha256(ranking.to_json()),
        "losses": list(result.losses),
        "seconds": result.seconds,
        "results": [asdict(row) for row in rows],
    }
    job.save(model, output, record, ranking)
    return record


def _control(
    job: TrainJob, control: Control, ranking: Ranking, selection: Selection
) -> Callable[[], TrainedSet]:
    names = control_modules(ranking, selection, control, job.options.training.seed)
    return lambda: job.train(names, control)[0]


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
