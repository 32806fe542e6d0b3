# SPDX-License-Identifier: Apache-2.0
"""A ranking in the terminal: heatmap, best and worst modules, provenance. Imports no torch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from keylayers.errors import RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.certainty import decisions, undecided
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy
from keylayers.report.adalora import adalora_line, ranks_left

# Cividis, dark to bright, by relative rank: readable for colour-blind people and in grey.
SHADES = (
    "#00204c", "#17336e", "#3a476b", "#53596c", "#696970",
    "#7f7c75", "#969078", "#b0a573", "#cbba69", "#fdea45",
)  # fmt: skip
FIRST_BRIGHT_SHADE = 5

UNDECIDED_MARK = "~"


def plain_table(*titles: str, num_left: int = 1, gap: int = 2) -> Table:
    """A table without lines: the first `num_left` columns hold text, the others numbers."""
    table = Table(box=None, padding=(0, gap), pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < num_left else "right", no_wrap=True)
    return table


def heatmap(ranking: Ranking, *, marked: Collection[str] = ()) -> Table:
    """Ranks by block (rows) and projection (columns); brighter is more important.

    Args:
        ranking: The ranking to show.
        marked: Names of the modules to mark as undecided.
    """
    ranks = ranking.ranks()
    projections = ranking.projections
    cells = {(module.block_index, module.projection): module for module in ranking.modules}
    table = Table(box=None, padding=0, pad_edge=False, title_justify="left")
    table.add_column("block ", justify="right", style="dim")
    for projection in projections:
        table.add_column(Text(f" {projection} "), justify="center")
    blocks = {module.block_index for module in ranking.modules}
    for block in sorted(blocks, key=lambda block: -1 if block is None else block):
        row: list[RenderableType] = ["outside " if block is None else f"{block} "]
        for projection in projections:
            module = cells.get((block, projection))
            rank = None if module is None else ranks[module.name]
            width = len(projection) + 2
            is_marked = module is not None and module.name in marked
            text = None if rank is None else f"{rank}{UNDECIDED_MARK if is_marked else ''}"
            position = 1 - ((rank or 1) - 1) / max(1, len(ranking.modules) - 1)
            row.append(_cell("" if module is None else text, position, width))
        table.add_row(*row)
    return table


def _cell(rank: str | None, position: float, width: int) -> Text:
    """A rank on its shade; `?` for a module without a score, blank if there is no module."""
    if rank is None:
        return Text("?".center(width), style="dim")
    if not rank:
        return Text(" " * width)
    shade = min(len(SHADES) - 1, int(position * len(SHADES)))
    colour = "#000000" if shade >= FIRST_BRIGHT_SHADE else "#ffffff"
    return Text(rank.center(width), style=Style(color=colour, bgcolor=SHADES[shade]))


def extremes(ranking: Ranking, count: int = 10, *, marked: Collection[str] = ()) -> Table:
    """The best and the worst modules; ± is the standard error of the score.

    Args:
        ranking: The ranking to show.
        count: Number of modules at each end.
        marked: Names of the modules to mark as undecided.
    """
    ordered = ranking.ordered()
    ranks = ranking.ranks()
    is_cut = len(ordered) > 2 * count
    chosen = [*ordered[:count], None, *ordered[-count:]] if is_cut else list(ordered)
    table = Table(box=None, padding=(0, 2), pad_edge=False)
    table.add_column("", width=len(UNDECIDED_MARK))
    table.add_column("rank", justify="right")
    table.add_column("module", no_wrap=True, overflow="ignore")
    table.add_column("score", justify="right")
    table.add_column("±", justify="right")
    table.add_column("parameters", justify="right")
    own_ranks = ranks_left(ranking)
    if own_ranks:
        table.add_column("AdaLoRA's r", justify="right")
    for module in chosen:
        if module is None:
            table.add_row("", "...", "", "", "", "")
            continue
        error = module.standard_error
        table.add_row(
            UNDECIDED_MARK if module.name in marked else "",
            str(ranks[module.name] or "?"),
            Text(module.name),
            "not scored" if module.score is None else f"{module.score:.4f}",
            "" if error is None else f"{error:.4f}",
            f"{module.num_parameters:,}",
            *([str(own_ranks.get(module.name, "?"))] if own_ranks else []),
        )
    return table


def certainty_line(ranking: Ranking, budget: WrittenBudget) -> str:
    """A sentence on how many modules are undecided at a budget.

    Raises:
        ConfigError: the budget is invalid, selects nothing or more than there is.
        RankingError: the budget includes modules without a score.
    """
    selection = ranking.select(budget)
    if ranking.is_flat:
        return (
            "all modules have the same score: nothing is ranked, and a budget takes them in the "
            "model's order; an update from the first steps of a warm-up adds nothing yet"
        )
    known = list(decisions(ranking, budget).values())
    num_unknown, num_open = known.count(None), known.count(False)
    if num_unknown == len(known):
        return "no intervals: the method gives none, or the budget is by cost and has no cut"
    text = f"at budget {selection.budget} ({len(selection.modules)} of {len(known)} modules), "
    if num_open:
        modules, whose = ("module is", "its") if num_open == 1 else ("modules are", "their")
        text += f"{num_open} {modules} not decided by the data (marked {UNDECIDED_MARK}): "
        text += f"{whose} 95 % interval contains the cut"
    else:
        text += "every module's place is decided"
    return text + (f"; {num_unknown} without an interval" if num_unknown else "")


def provenance_lines(ranking: Ranking) -> list[str]:
    """What made the ranking, line by line: method, model, data, losses, time, version."""
    made_by = ranking.made_by
    model, data, environment = made_by.model, made_by.data, made_by.environment
    lines = [f"method    {ranking.method}, one gate per {ranking.granularity}"]
    if model.name is not None:
        parts = () if model.weights_sha256 is None else (f"weights {model.weights_sha256[:12]}",)
        lines.append("model     " + ", ".join((model.name, *parts)))
    if made_by.adapter is not None:
        lines.append(f"adapter   {made_by.adapter.name}")
    if made_by.tuned is not None:
        lines.append(f"tuned     {made_by.tuned.name}")
    if data.data is not None:
        lines.append(
            f"data      {data.data} ({data.format}): {data.num_train} examples to train, "
            f"{data.num_held_out} held out"
        )
    lines += _loss_lines(made_by)
    if environment.keylayers is not None:
        source = "" if environment.commit is None else f" at {environment.commit[:12]}"
        lines.append(f"made by   keylayers {environment.keylayers}{source}")
    return lines


def _loss_lines(made_by: MadeBy) -> list[str]:
    lines = []
    stage_1, inside, mask = made_by.stage_1, made_by.inside_run, made_by.mask
    if stage_1 is not None:
        lines.append(
            f"stage 1   {stage_1.num_steps} steps ({stage_1.stopped_by}), {stage_1.seconds:.0f} s"
        )
    if inside is not None:
        lines.append(
            f"stage 1   inside a run, until step {inside.at_step} of {inside.num_steps} "
            f"({inside.reason})"
        )
    if mask is not None:
        unit = made_by.loss_unit if mask.score_unit == "the trainer's loss" else mask.score_unit
        unit = f", scores in {unit}" if unit else ""
        lines.append(f"stage 2   {len(mask.losses)} passes, {mask.seconds:.0f} s{unit}")
        if mask.loss_reduction_nats is not None and mask.sum_of_scores_nats is not None:
            lines.append(
                f"          scores sum to {mask.sum_of_scores_nats:.3f}"
                f"{in_nats(made_by.loss_unit)}, the fine-tune lowers the loss by "
                f"{mask.loss_reduction_nats:.3f} on the same batches"
            )
    losses = made_by.held_out_loss_nats
    if losses is not None:
        lines.append(
            f"held out  base {losses.base:.3f}, tuned {losses.tuned:.3f} {made_by.loss_unit}"
        )
    return lines


def in_nats(loss_unit: str) -> str:
    """`" nats"` if losses are in nats, else an empty string."""
    return " nats" if loss_unit.startswith("nats") else ""


def ranking_report(ranking: Ranking, *, budget: WrittenBudget = 0.3) -> RenderableType:
    """All of a ranking that a terminal shows.

    Args:
        ranking: The ranking to show.
        budget: Modules that are undecided at this budget are marked. If it includes modules
            without a score, none is marked and a line says why.

    Raises:
        ConfigError: the budget is invalid, selects nothing or more than there is.
    """
    num_parameters = sum(module.num_parameters for module in ranking.modules)
    title = (
        f"{len(ranking.modules)} modules, {num_parameters:,} parameters; 1 is the most important"
    )
    marked: tuple[str, ...] = ()
    try:
        marked = undecided(ranking, budget)
        note = certainty_line(ranking, budget)
    except RankingError as error:
        note = f"nothing is marked at budget {budget}: {error}"
    if comparison := adalora_line(ranking, budget):
        note = f"{note}\n{comparison}"
    return Group(
        Text(title, style="bold"),
        heatmap(ranking, marked=marked),
        Text(),
        extremes(ranking, marked=marked),
        Text(note),
        Text(),
        Text("\n".join(provenance_lines(ranking)), style="dim"),
    )


def loss_table(rows: Sequence[Mapping[str, Any]], loss_unit: str = "nats per token") -> Table:
    """One row per trained set: modules, trained parameters, steps, held-out loss."""
    held_out = f"held-out{in_nats(loss_unit) or ' loss'}"
    table = plain_table("trained", "modules", "parameters", "steps", held_out)
    for row in rows:
        table.add_row(
            Text(row["label"]),
            f"{row['num_modules']:,}",
            f"{row['num_trained_parameters']:,}",
            f"{row['num_steps']:,}",
            f"{row['held_out_loss_nats']:.4f}",
        )
    return table
