# SPDX-License-Identifier: Apache-2.0
"""Prune an update that exists already to the modules that a ranking and a budget select.

Nothing is trained. An adapter loses the other modules; of two checkpoints the tuned one gets the
base's weights back in them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from keylayers.commands.repeat import how_it_was_made
from keylayers.commands.run_options import PruneOptions
from keylayers.commands.selection import budget_of
from keylayers.errors import OutputError
from keylayers.files import (
    CARD,
    RECORD,
    check_replaceable,
    json_sha256,
    output_folder,
    replaced_folder,
    unfinished,
    write_json,
    write_text,
)
from keylayers.progress import Progress, Silent
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.report.model_card import model_card
from keylayers.runs.prune_steps import Kind, PruneJob, Size, measured


@dataclass(frozen=True)
class PrunedUpdate:
    """What was pruned, and how well it does. Losses are means over the held-out examples.

    Attributes:
        kind: What was pruned and written.
        modules: Full names of the modules that were kept, in model order.
        full: Size before.
        pruned: Size after.
        base_loss_nats: Held-out loss of the base model.
        full_loss_nats: Held-out loss with the whole update.
        pruned_loss_nats: Held-out loss of what was written, loaded once more.
        num_held_out: Held-out examples.
        loss_unit: What a loss counts.
    """

    kind: Kind
    modules: tuple[str, ...]
    full: Size
    pruned: Size
    base_loss_nats: float
    full_loss_nats: float
    pruned_loss_nats: float
    num_held_out: int
    loss_unit: str


def prune(options: PruneOptions, output: Path, progress: Progress | None = None) -> PrunedUpdate:
    """Write an adapter or a tuned checkpoint with only the selected modules, and prove it.

    Args:
        options: Everything that decides the result.
        output: Folder of the adapter or checkpoint; new, empty, or an earlier result of keylayers.
        progress: Where to report to.

    Raises:
        KeylayersError: a bad option, ranking, model, update, data set or output; nothing is left
            behind then.
    """
    progress = progress or Silent()
    ranking = Ranking.load(options.selection.ranking)
    selection = ranking.select(budget_of(options.selection, ranking))
    check_replaceable(output)
    _check_apart(options, output)
    _note_selection(selection, progress)
    with output_folder(output), unfinished(output):
        job = measured(options, ranking, selection, progress)
        with replaced_folder(output) as folder:
            found = _written(job, folder)
            record = job.record | {
                "selection": selection.record(),
                "ranking_sha256": json_sha256(ranking.to_json()),
                "result": asdict(found),
            }
            write_text(
                folder / CARD,
                model_card(record, ranking, how_it_was_made("prune", record["options"], ranking)),
            )
            write_json(folder / RECORD, record)
    return found


def _written(job: PruneJob, folder: Path) -> PrunedUpdate:
    full, pruned = job.write(folder)
    base_loss, loss = job.measure(folder)
    return PrunedUpdate(
        kind=job.kind,
        modules=job.selection.names,
        full=full,
        pruned=pruned,
        base_loss_nats=base_loss,
        full_loss_nats=job.full_loss_nats,
        pruned_loss_nats=loss,
        num_held_out=len(job.data.held_out),
        loss_unit=job.record["loss_unit"],
    )


def _check_apart(options: PruneOptions, output: Path) -> None:
    """Refuse an output that would take the place of what is read."""
    for name, value in options.flat().items():
        is_read = name in ("ranking", "adapter", "tuned", "model", "data") and value is not None
        path = Path(str(value)).resolve()
        if is_read and path.exists() and output.resolve() in (path, *path.parents):
            raise OutputError(
                f"the output must lie apart from what is read, but `{name}` {value!r} is in "
                f"{str(output)!r}; choose another folder"
            )


def _note_selection(selection: Selection, progress: Progress) -> None:
    if len(selection.modules) == selection.num_candidates:
        progress.note("the budget keeps every module, so nothing is pruned")
    if selection.num_tied_out:
        progress.note(
            f"{selection.num_tied_out} modules left out have the same score as the last one taken; "
            f"ties go by the model's order"
        )
