# SPDX-License-Identifier: Apache-2.0
"""A training run: the modules that a ranking and a budget select, or `--rank-first`.

With `--rank-first` one run trains, ranks and freezes, which is the paper's algorithm.
"""

import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from keylayers.commands.fine_tuning import FineTuned, FineTuning, Wanted, frozen_label
from keylayers.commands.options import Control, TrainOptions, flat_values
from keylayers.commands.session import Session, note_ties
from keylayers.errors import ConfigError
from keylayers.files import check_replaceable, output_folder, unfinished
from keylayers.processes import from_first
from keylayers.progress import Progress
from keylayers.ranking.budget import GIB, Budget, Memory
from keylayers.ranking.parts import parts_in_order
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import TrainedSet
from keylayers.ranking.selection import Selection
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.memory import measured_memory
from keylayers.training.options import StabilityOptions

T = TypeVar("T")


@contextmanager
def _open(
    options: TrainOptions, output: Path, progress: Progress, ranking: Ranking | None = None
) -> Iterator[FineTuning]:
    """Load and check everything before any training; only this run may write to the output."""
    training, wanted = options.training, options.selection
    check_replaceable(output)
    with output_folder(output), unfinished(output) as before:
        session = Session(options, training, progress, ranking=ranking, is_full=training.is_full)
        if not wanted.rank_first:  # these have no effect
            session.record["options"] = flat_values(options, without=("stability", "scoring"))
        yield FineTuning(session, training, wanted.steps, output, before)


def run_train(options: TrainOptions, output: Path, progress: Progress) -> list[TrainedSet]:
    """Train the selected modules, prove that only they were trained, and write the result."""
    wanted = options.selection
    assert wanted.ranking is not None
    ranking = Ranking.load(wanted.ranking)
    _check_ranks(ranking, options)
    budget = wanted.budget_for(ranking)
    selection = None if isinstance(budget, Memory) else ranking.select(budget)
    with _open(options, output, progress, ranking) as job:
        if selection is None:
            selection = _select_within(job, ranking, budget)
        note_ties(selection, progress)
        sets = {  # before any training, which a refused control would waste
            control: control_modules(ranking, selection, control, options.training.seed)
            for control in wanted.controls
        }
        selected: Wanted = selection.ranks or selection.names
        record = job.finished(job.inputs_sha256(selected), ranking)
        if record is None:
            trained = job.train(selected, "selected", measure_base=True)
            own = {"selection": selection.record()}
            record = job.save(trained, ranking, own, *_stage_1_row(job, ranking))

        def train(control: Control) -> FineTuned:
            return job.train(sets[control], control)

        return job.compare(record, ranking, {name: name for name in wanted.controls}, train)


def run_rank_first(options: TrainOptions, output: Path, progress: Progress) -> list[TrainedSet]:
    """Fine-tune all modules, freeze the lowest-ranked when the loss is stable, and continue."""
    wanted = options.selection

    def freeze(stability: StabilityOptions, scoring: ScoringOptions) -> FreezeUnimportant:
        return FreezeUnimportant(
            0.25 if wanted.freeze is None else wanted.freeze,  # a quarter as in the paper
            action=wanted.action,
            **asdict(stability),
            method=scoring,
            progress=progress,
        )

    callback = freeze(options.stability, options.scoring.scoring())
    with _open(options, output, progress) as job:
        names = job.session.names
        record = job.finished(job.inputs_sha256(names, callback), None)
        if record is None:
            trained = job.train(names, "selected", callback, measure_base=True)
            record = _save_ranked(job, trained, callback)
        step = record["frozen"]["at_step"]

        def train(control: Control) -> FineTuned:
            if control == "all":
                return job.train(names, control)
            at_step = StabilityOptions(max_steps=step, epsilon=0.0)
            of_others = freeze(at_step, scoring_options(control))  # looks at no data
            return job.train(names, control, of_others)

        labels = {
            control if control == "all" else frozen_label(control, wanted.action, step): control
            for control in wanted.controls
        }
        return job.compare(record, Ranking.load(output), labels, train)


def _save_ranked(
    job: FineTuning, trained: FineTuned, callback: FreezeUnimportant
) -> dict[str, Any]:
    """Write the result with the ranking that was made inside the run; its record."""
    assert callback.ranking is not None
    assert callback.selection is not None
    frozen = {
        "at_step": callback.frozen_at_step,
        "reason": callback.reason,
        "action": callback.action,
    }
    provenance = {
        **callback.ranking.provenance,
        **{name: job.session.record[name] for name in ("environment", "model", "data", "options")},
        "inside_run": frozen | {"num_steps": job.num_steps, "stability": callback.stability},
    }
    own = {
        "selection": callback.selection.record(),
        "frozen": frozen | {"modules": list(callback.frozen)},
    }
    return job.save(trained, replace(callback.ranking, provenance=provenance), own)


def _select_within(job: FineTuning, ranking: Ranking, budget: Budget) -> Selection:
    """The selection of a budget in GiB, from a measured step that trains every ranked module."""
    names = [module.name for module in ranking.modules]
    memory = measured_memory(job.trainer(names, "memory"))
    selection = from_first(ranking.select(budget, memory))
    held = memory.of(selection.names)
    job.session.progress.note(
        f"a step of {len(selection.modules)} modules holds {held / GIB:.3g} GiB "
        f"(batches of {memory.batch})"
    )
    job.session.record["step_memory_bytes"] = int(held)
    return selection


def _stage_1_row(job: FineTuning, ranking: Ranking) -> list[TrainedSet]:
    """All modules as stage 1 of the ranking trained them, if model and data are the same."""
    made_by = ranking.made_by
    stage_1, held_out = made_by.stage_1, made_by.held_out_loss_nats
    is_same = (
        made_by.options.objective == job.session.objective
        and made_by.model.weights_sha256 == job.session.record["model"]["weights_sha256"]
        and made_by.data.split_sha256 == job.session.record["data"]["split_sha256"]
    )
    if stage_1 is None or held_out is None or not is_same or job.options.is_full:
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


def _check_ranks(ranking: Ranking, options: TrainOptions) -> None:
    """Refuse what does not go with a ranking of rank-one parts, or needs one."""
    update = options.training.update
    if ranking.is_of_parts and update in ("full", "adalora"):
        raise ConfigError(
            f"`update` must be lora, rslora or dora with a ranking of rank-one parts, which gives "
            f"each module its LoRA rank, got {update}"
        )
    if not ranking.is_of_parts and "uniform" in options.selection.controls:
        raise ConfigError(
            f"`controls` uniform needs a ranking of rank-one parts, but this one is by "
            f"{ranking.granularity}; rank with `granularity` part"
        )


def control_modules(ranking: Ranking, selection: Selection, control: Control, seed: int) -> Wanted:
    """The modules of a control, in model order; as many as selected, except for `all`.

    If rank-one parts are ranked, a control gives LoRA ranks, from as many other parts. `uniform` is
    the highest rank for all modules alike that needs no more parameters than the selection.
    """
    names = [module.name for module in ranking.modules]
    if control == "all":
        return tuple(names)
    if selection.ranks is not None:
        return _control_ranks(ranking, selection, control, seed)
    best = [module.name for module in ranking.ordered()]
    chosen = _chosen(control, names, best, len(selection.modules), seed)
    return tuple(name for name in names if name in chosen)


def _control_ranks(
    ranking: Ranking, selection: Selection, control: Control, seed: int
) -> dict[str, int]:
    best = [part for part in parts_in_order(ranking.modules) if not part.is_magnitude]
    places = {module.name: place for place, module in enumerate(ranking.modules)}
    if control == "uniform":
        one_of_each = sum(part.num_parameters for part in best if part.index == 0)
        rank = selection.num_parameters // one_of_each
        if rank == 0:
            raise ConfigError(
                f"`controls` uniform needs a budget of rank 1 in every module, which takes "
                f"{one_of_each:,} parameters, but {selection.budget} selects "
                f"{selection.num_parameters:,}; raise the budget, or leave the control out"
            )
        return dict.fromkeys(places, rank)
    size = sum((selection.ranks or {}).values())
    in_order = sorted(best, key=lambda part: (places[part.module_name], part.index))
    chosen = _chosen(control, in_order, best, size, seed)
    counts = Counter(part.module_name for part in chosen)
    return {name: counts[name] for name in places if name in counts}


def _chosen(
    control: Control, in_order: Sequence[T], best: Sequence[T], size: int, seed: int
) -> Collection[T]:
    """`size` of all modules, or parts, which are given in the model's order and best first."""
    if control == "random":
        return random.Random(seed).sample(in_order, size)
    if control == "worst":
        return best[-size:]
    return in_order[:size] if control == "first" else in_order[-size:]
