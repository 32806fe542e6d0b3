# SPDX-License-Identifier: Apache-2.0
"""Results in the terminal: of rankings, trainings and prunings. Imports no torch."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from keylayers.errors import RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.certainty import decisions, undecided
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy, Pruned, Stability, TrainedSet
from keylayers.report.source import grid

# Cividis, dark to bright, by relative rank: readable for colour-blind people and in grey.
SHADES = (
    "#00204c", "#17336e", "#3a476b", "#53596c", "#696970",
    "#7f7c75", "#969078", "#b0a573", "#cbba69", "#fdea45",
)  # fmt: skip
FIRST_BRIGHT_SHADE = 5
UNDECIDED_MARK = "~"
NUM_EXTREMES = 10  # modules shown at each end
MIB = 2**20


def ranking_report(ranking: Ranking, budget: WrittenBudget = 0.3) -> RenderableType:
    """Everything the terminal shows of a ranking; modules undecided at the budget are marked.

    For a ranking of rank-one parts, it shows the LoRA ranks that the budget buys.
    """
    if ranking.is_of_parts:
        return _parts_report(ranking, budget)
    num_parameters = sum(module.num_parameters for module in ranking.modules)
    title = (
        f"{len(ranking.modules)} modules, {num_parameters:,} parameters; 1 is the most important"
    )
    marked: tuple[str, ...] = ()
    try:
        marked = undecided(ranking, budget)
        notes = [certainty_line(ranking, budget)]
    except RankingError as error:  # the budget includes modules without a score
        notes = [f"nothing is marked at budget {budget}: {error}"]
    notes += _adalora_lines(ranking, budget)
    return Group(
        Text(title, style="bold"),
        heatmap(ranking, marked=marked),
        Text(),
        _extremes(ranking, marked),
        Text("\n".join(notes)),
        Text(),
        Text("\n".join(provenance_lines(ranking)), style="dim"),
    )


def _parts_report(ranking: Ranking, budget: WrittenBudget) -> RenderableType:
    selection = ranking.select(budget)
    ranks = selection.ranks or {}
    size = selection.num_parameters / selection.num_candidate_parameters
    cells = {}
    for block, modules in grid(ranking).items():
        for module, projection in zip(modules, ranking.projections, strict=True):
            rank = 0 if module is None else ranks.get(module.name, 0)
            shade = _shade(rank / max(ranks.values())) if rank else Style(dim=True)
            text = "" if module is None else str(rank or ".")
            cells[block, projection] = (text, shade)
    return Group(
        Text(f"LoRA rank of each module at budget {selection.budget}", style="bold"),
        block_table(cells),
        Text(),
        Text(
            f"{selection.num_parts:,} of {ranking.num_parts:,} rank-one parts in {len(ranks)} of "
            f"{len(ranking.modules)} modules: {selection.num_parameters:,} of "
            f"{selection.num_candidate_parameters:,} parameters ({size:.1%})"
        ),
        Text(),
        Text("\n".join(provenance_lines(ranking)), style="dim"),
    )


def plain_table(*titles: str, num_left: int = 1, gap: int = 2) -> Table:
    """A table without lines: the first `num_left` columns hold text, the others numbers."""
    table = Table(box=None, padding=(0, gap), pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < num_left else "right", no_wrap=True)
    return table


def heatmap(ranking: Ranking, *, marked: Collection[str] = ()) -> Table:
    """Ranks by block (rows) and projection (columns); brighter is more important."""
    ranks, cells = ranking.ranks(), {}
    for block, modules in grid(ranking).items():
        for module, projection in zip(modules, ranking.projections, strict=True):
            text, style = "", Style()
            if module is not None and (rank := ranks[module.name]) is not None:
                text = f"{rank}{UNDECIDED_MARK if module.name in marked else ''}"
                style = _shade(1 - (rank - 1) / max(1, len(ranking.modules) - 1))
            elif module is not None:
                text, style = "?", Style(dim=True)
            cells[block, projection] = (text, style)
    return block_table(cells)


def block_table(cells: Mapping[tuple[str, str], tuple[str, Style]]) -> Table:
    """Text and style of each (block, projection), laid out as blocks by projections."""
    projections = list(dict.fromkeys(projection for _, projection in cells))
    table = Table(box=None, padding=0, pad_edge=False, title_justify="left")
    table.add_column("block ", justify="right", style="dim")
    for projection in projections:
        table.add_column(Text(f" {projection} "), justify="center")
    for block in dict.fromkeys(block for block, _ in cells):
        row = [Text(f"{block} ")]
        for projection in projections:
            text, style = cells.get((block, projection), ("", Style()))
            row.append(Text(text.center(len(projection) + 2), style=style))
        table.add_row(*row)
    return table


def _shade(position: float) -> Style:
    """Background and readable text colour of a position from 0, the worst, to 1, the best."""
    shade = min(len(SHADES) - 1, int(position * len(SHADES)))
    ink = "#000000" if shade >= FIRST_BRIGHT_SHADE else "#ffffff"
    return Style(color=ink, bgcolor=SHADES[shade])


def _extremes(ranking: Ranking, marked: Collection[str]) -> Table:
    """The best and the worst modules; ± is the standard error of the score."""
    ordered, ranks, adalora = ranking.ordered(), ranking.ranks(), ranking.made_by.adalora_ranks_left
    more = ["AdaLoRA's r"] if adalora else []
    table = plain_table("", "rank", "module", "score", "±", "parameters", *more)
    table.columns[0].width = len(UNDECIDED_MARK)
    table.columns[1].justify, table.columns[2].justify = "right", "left"
    for place, module in enumerate(ordered):
        if NUM_EXTREMES <= place < len(ordered) - NUM_EXTREMES:
            if place == NUM_EXTREMES:
                table.add_row("", "...")
            continue
        error = module.standard_error
        table.add_row(
            UNDECIDED_MARK if module.name in marked else "",
            str(ranks[module.name] or "?"),
            Text(module.name),
            "not scored" if module.score is None else f"{module.score:.4f}",
            "" if error is None else f"{error:.4f}",
            f"{module.num_parameters:,}",
            *([str(adalora.get(module.name, "?"))] if adalora else []),
        )
    return table


def certainty_line(ranking: Ranking, budget: WrittenBudget) -> str:
    """A sentence on how many modules are undecided at a budget."""
    selection = ranking.select(budget)
    if ranking.is_flat:
        return (
            "all modules have the same score: nothing is ranked, and a budget takes them in the "
            "model's order; an update from the first steps of a warm-up adds nothing yet"
        )
    known = list(decisions(ranking, budget).values())
    num_unknown, num_open = known.count(None), known.count(False)
    if num_unknown == len(known):
        has_errors = any(module.standard_error is not None for module in ranking.modules)
        why = "a budget by cost has no cut" if has_errors else "the method gives none"
        return f"no intervals: {why}"
    text = f"at budget {selection.budget} ({len(selection.modules)} of {len(known)} modules), "
    if num_open:
        modules, whose = ("module is", "its") if num_open == 1 else ("modules are", "their")
        text += f"{num_open} {modules} not decided by the data (marked {UNDECIDED_MARK}): "
        text += f"{whose} 95 % interval contains the cut"
    else:
        text += "every module's place is decided"
    return text + (f"; {num_unknown} without an interval" if num_unknown else "")


def _adalora_lines(ranking: Ranking, budget: WrittenBudget) -> Iterator[str]:
    """How far the ranking agrees with AdaLoRA's own allocation of ranks, if there is one."""
    ranks = ranking.made_by.adalora_ranks_left
    if any(module.name not in ranks for module in ranking.modules):
        return
    own = (
        replace(module, score=float(ranks[module.name]), standard_error=None)
        for module in ranking.modules
    )
    with suppress(RankingError):  # the budget includes modules without a score
        (found,) = agreement([ranking, replace(ranking, modules=tuple(own))], budget)
        tau = "none" if found.tau is None else f"{found.tau:.2f}"
        yield (
            f"AdaLoRA's own budget (last column) agrees with the scores by tau-b {tau}, Jaccard "
            f"{found.jaccard:.2f} at budget {budget} (chance {found.chance_jaccard:.2f})"
        )


def provenance_lines(ranking: Ranking) -> list[str]:
    """What made the ranking, line by line: method, model, data, losses, time, version."""
    made_by = ranking.made_by
    data, losses, software = made_by.data, made_by.held_out_loss_nats, made_by.environment
    weights, commit = made_by.model.weights_sha256, software.commit
    facts = [("method", f"{ranking.method}, one gate per {ranking.granularity}")]
    if made_by.model.name is not None:
        known = "" if weights is None else f", weights {weights[:12]}"
        facts.append(("model", f"{made_by.model.name}{known}"))
    for title, update in (("adapter", made_by.adapter), ("tuned", made_by.tuned)):
        facts += [] if update is None else [(title, str(update.name))]
    if data.data is not None:
        numbers = f"{data.num_train} examples to train, {data.num_held_out} held out"
        facts.append(("data", f"{data.data} ({data.format}): {numbers}"))
    facts += _stages(made_by)
    if losses is not None:
        both = f"base {losses.base:.3f}, tuned {losses.tuned:.3f}"
        facts.append(("held out", f"{both} {made_by.loss_unit}"))
    if software.keylayers is not None:
        source = "" if commit is None else f" at {commit[:12]}"
        facts.append(("made by", f"keylayers {software.keylayers}{source}"))
    return [f"{title:10}{fact}" for title, fact in facts]


def _stages(made_by: MadeBy) -> Iterator[tuple[str, str]]:
    stage_1, inside, mask = made_by.stage_1, made_by.inside_run, made_by.mask
    if stage_1 is not None:
        how = f"{stage_1.num_steps} steps ({stage_1.stopped_by}), {stage_1.seconds:.0f} s"
        yield "stage 1", how
        yield from _why(stage_1.stability, stage_1.stopped_by)
    if inside is not None:
        until = f"step {inside.at_step} of {inside.num_steps} ({inside.reason})"
        yield "stage 1", f"inside a run, until {until}"
        yield from _why(inside.stability, inside.reason)
    if mask is not None:
        unit = made_by.loss_unit if mask.score_unit == "the trainer's loss" else mask.score_unit
        unit = f", scores in {unit}" if unit else ""
        yield "stage 2", f"{len(mask.losses)} passes, {mask.seconds:.0f} s{unit}"
        if mask.loss_reduction_nats is not None and mask.sum_of_scores_nats is not None:
            total = f"{mask.sum_of_scores_nats:.3f}{in_nats(made_by.loss_unit)}"
            lowered = f"the fine-tune lowers the loss by {mask.loss_reduction_nats:.3f}"
            yield "", f"scores sum to {total}, {lowered} on the same batches"


def _why(seen: Stability, reason: str) -> Iterator[tuple[str, str]]:
    """Why stage 1 ended, if losses were measured; older files hold none."""
    if seen.measurements:
        yield "", seen.why(reason)


def loss_table(rows: Sequence[TrainedSet], loss_unit: str = "nats per token") -> Table:
    """One row per trained set: modules, trained parameters, steps, held-out loss."""
    table = plain_table("trained", "modules", "parameters", "steps", held_out_title(loss_unit))
    for row in rows:
        table.add_row(
            Text(row.label),
            f"{row.num_modules:,}",
            f"{row.num_trained_parameters:,}",
            f"{row.num_steps:,}",
            f"{row.held_out_loss_nats:.4f}",
        )
    return table


def pruning_report(found: Pruned) -> RenderableType:
    """What the terminal shows of a pruning."""
    return Group(_pruning_table(found), Text(), Text("\n".join(reading_of_pruning(found))))


def _pruning_table(found: Pruned) -> Table:
    """Base model, full and pruned update, one row each, with their mean held-out losses."""
    title = held_out_title(found.loss_unit)
    table = plain_table("update", "modules", "parameters", "MiB on disk", title)
    table.add_row("none (base model)", "0", "0", "", f"{found.base_loss_nats:.4f}")
    full, pruned = (found.full, found.full_loss_nats), (found.pruned, found.pruned_loss_nats)
    for label, (size, loss) in (("full", full), ("pruned", pruned)):
        counts = f"{size.num_modules:,}", f"{size.num_parameters:,}"
        table.add_row(
            f"{label} {found.kind}", *counts, f"{size.num_bytes / MIB:,.2f}", f"{loss:.4f}"
        )
    if found.healed_loss_nats is not None:
        table.add_row("the same, trained again", "", "", "", f"{found.healed_loss_nats:.4f}")
    return table


def reading_of_pruning(found: Pruned) -> list[str]:
    """Whether the pruned update is better or worse than the full one, in sentences."""
    base, full, pruned = found.base_loss_nats, found.full_loss_nats, found.pruned_loss_nats
    kept, num_modules = len(found.modules), found.full.num_modules
    on = f"on the {found.num_held_out} held-out examples"
    difference = f"{abs(full - pruned):.4f}"
    if kept == num_modules and found.pruned.num_parts == found.full.num_parts:
        line = f"all {kept} modules are kept: the weights are those of the full one"
    elif difference == "0.0000":
        line = f"the pruned {found.kind} is as good as the full one {on}"
    else:
        line = (
            f"the pruned {found.kind} is {'better' if full > pruned else 'worse'} than the full "
            f"one, by {difference}{in_nats(found.loss_unit)} {on}"
        )
    if full >= base:
        return [line, "the full update does not lower the held-out loss of the base model"]
    share = (base - pruned) / (base - full)
    kept_share = f"{kept} of {num_modules} modules it keeps {share:.1%}"
    if found.full.num_parts is not None:
        size = found.pruned.num_parameters / found.full.num_parameters
        kept_share = (
            f"{found.pruned.num_parts} of {found.full.num_parts} rank-one parts ({size:.1%} of the "
            f"parameters) it keeps {share:.1%}"
        )
    return [line, f"with {kept_share.replace('%', ' %')} of what the full one lowers the loss by"]


def held_out_title(loss_unit: str) -> str:
    """The title of a column of held-out losses."""
    return f"held-out{in_nats(loss_unit) or ' loss'}"


def in_nats(loss_unit: str) -> str:
    """`" nats"` if losses are in nats, else an empty string."""
    return " nats" if loss_unit.startswith("nats") else ""
