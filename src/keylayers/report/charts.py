# SPDX-License-Identifier: Apache-2.0
"""Altair charts of a ranking, used by the HTML report and by figures for papers.

The colours are cividis and four from Okabe and Ito, which colour-blind readers can tell apart;
lines also differ in their dashes. Names from files are data, never part of a Vega expression.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import permutations
from typing import TYPE_CHECKING, Any, TypeAlias

import altair as alt

from keylayers.ranking.compare import Agreement
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.ranking.verification import Verification
from keylayers.report.curve import BEST_RIVAL, random_spreads
from keylayers.report.source import grid, module_rows

if TYPE_CHECKING:
    import pandas as pd

Chart: TypeAlias = alt.Chart | alt.LayerChart
BudgetExpression: TypeAlias = int | str
"""A number of modules, or the name of the Vega parameter that holds it."""

SCHEME = "cividis"
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
PURPLE = "#cc79a7"
CELL_WIDTH = 44
LABELLED_HEIGHT = 14  # smallest cell height, in pixels, that has room for a number
NAMES_ON_TOP = alt.Axis(orient="top", labelAngle=-40, labelAlign="left", labelLimit=220)
EDGE = {"stroke": GREY, "strokeWidth": 0.5}  # keeps the darkest shade visible on a dark page
ON_TOP = alt.Legend(title=None, orient="top")
FROM_LOWEST = alt.Scale(zero=False)
RANDOM = "random (± sd)"
STAGE_1, STAGE_2 = "stage 1, training", "stage 2, learning the scores"
LINES: Mapping[str, tuple[str, list[int]]] = {  # colour and dashes
    "best first": (BLUE, [1, 0]),
    "leave-one-out": (GREEN, [6, 2]),
    RANDOM: (GREY, [2, 2]),
    "worst first": (VERMILION, [8, 3, 2, 3]),
    BEST_RIVAL: (PURPLE, [4, 2]),
    STAGE_1: (BLUE, [1, 0]),
    STAGE_2: (GREEN, [6, 2]),
}


def heatmap_chart(ranking: Ranking, budget: BudgetExpression) -> Chart:
    """Ranks by block (rows) and projection (columns); modules in the budget fill their cells."""
    rows = module_rows(ranking)
    num = len(rows)
    base = _cells(ranking, rows)
    scored = base.transform_filter("isValid(datum.rank)")
    taken = scored.transform_filter(f"datum.place <= {budget}")
    ticks = sorted({1, max(1, num // 3), max(1, 2 * num // 3), num})
    shade = _shade("rank", [num, 1], values=ticks)
    small = alt.RelativeBandSize(0.4)
    tooltip = [
        *("module:N", "rank:Q", alt.Tooltip("score:Q", format=".5~g")),
        alt.Tooltip("error:Q", title="± standard error", format=".2~g"),
        alt.Tooltip("parameters:Q", format=","),
    ]
    layers = [
        scored.mark_rect(width=small, height=small, **EDGE).encode(color=shade),
        taken.mark_rect(**EDGE).encode(color=shade),
        *_numbers(taken, ranking, is_bright=f"datum.place <= {num / 2}"),
        base.transform_filter("!isValid(datum.rank)").mark_text(text="?"),
        base.mark_rect(opacity=0).encode(tooltip=tooltip),
    ]
    what = "Heatmap of ranks: blocks down, projections across, brighter is more important"
    return _heatmap(ranking, layers, what)


def ranks_chart(ranking: Ranking, chosen: Sequence[Selection], position: BudgetExpression) -> Chart:
    """LoRA ranks by block (rows) and projection (columns), of the selection at `position`.

    Colours go up to the highest rank that a module can have.
    """
    highest = max(module.num_parts - module.has_magnitude_part for module in ranking.modules)
    ranks = [selection.ranks or {} for selection in chosen]
    rows = [
        {key: row[key] for key in ("module", "block", "projection")}
        | {"ranks": [own.get(row["module"], 0) for own in ranks]}
        for row in module_rows(ranking)
    ]
    cells = _cells(ranking, rows).transform_calculate(rank=f"datum.ranks[{position}]")
    cells = cells.encode(tooltip=["module:N", alt.Tooltip("rank:Q", title="kept rank")])
    shade = _shade("LoRA rank", [0, highest], tickMinStep=1)
    layers = [
        cells.mark_rect(**EDGE).encode(color=shade),
        *_numbers(cells, ranking, is_bright=f"datum.rank > {highest / 2}"),
    ]
    what = "Heatmap of LoRA ranks: blocks down, projections across, brighter keeps more"
    return _heatmap(ranking, layers, what)


def _cells(ranking: Ranking, rows: list[dict[str, Any]]) -> alt.Chart:
    return _chart(rows).encode(
        x=alt.X("projection:N", sort=list(ranking.projections), title=None, axis=NAMES_ON_TOP),
        y=alt.Y("block:N", sort=list(grid(ranking)), title="block"),
    )


def _shade(title: str, domain: Sequence[int], **legend: Any) -> alt.Color:
    return alt.Color(
        "rank:Q",
        scale=alt.Scale(scheme=SCHEME, domain=list(domain)),
        legend=alt.Legend(title=title, orient="right", gradientLength=110, **legend),
    )


def _numbers(cells: alt.Chart, ranking: Ranking, is_bright: str) -> list[alt.Chart]:
    """The ranks in cells that have room, in black where `is_bright` is true."""
    if _cell_height(ranking) < LABELLED_HEIGHT:
        return []
    ink = alt.when(is_bright).then(alt.value("black")).otherwise(alt.value("white"))
    return [cells.mark_text(fontSize=10).encode(text="rank:Q", color=ink)]


def _heatmap(ranking: Ranking, layers: Sequence[alt.Chart], description: str) -> Chart:
    return alt.layer(*layers).properties(
        width=CELL_WIDTH * len(ranking.projections),
        height=_cell_height(ranking) * len(grid(ranking)),
        description=description,
    )


def _cell_height(ranking: Ranking) -> int:
    num_blocks = len(grid(ranking))
    return 20 if num_blocks <= 40 else LABELLED_HEIGHT if num_blocks <= 90 else 8


def curve_chart(found: Verification, budget: BudgetExpression) -> Chart:
    """Held-out loss by what is kept, modules or parameters of parts, with a rule at the budget.

    The axis of parameters is logarithmic, so the base, which has none, is left out.
    """
    best, loo, sizes = found.best_first, found.leave_one_out, found.best_first.num_parameters
    losses: dict[str, Sequence[float]] = {RANDOM: found.random_means()}
    losses |= {"best first": best.losses, "worst first": found.worst_first.losses}
    losses |= {"leave-one-out": loo.losses} if loo else {}
    losses |= {BEST_RIVAL: found.best_of_rivals()} if found.rivals else {}
    at, title, places = "kept", "modules that keep their update, best first", best.counts
    middle, kind, axis = places[-1] / 2, "linear", alt.Axis()
    if sizes:
        at, title, places = "parameters", "parameters of the parts that are kept", sizes[1:]
        middle, kind = (places[0] * places[-1]) ** 0.5, "log"
        axis = alt.Axis(format="~s", labelOverlap=True)
    scale = alt.Scale(type=kind, domain=[places[0], places[-1]], nice=False)
    kept = alt.X(f"{at}:Q", title=title, scale=scale, axis=axis)
    loss = alt.Y("loss:Q", title=f"held-out loss, {found.made_by.loss_unit}", scale=FROM_LOWEST)

    def points(values: Sequence[float]) -> list[tuple[int, float]]:
        return list(zip(places, values[-len(places) :], strict=True))

    curves = {name: points(own) for name, own in losses.items()}
    spreads = points(random_spreads(found))
    bands = [
        {at: place, "low": mean - spread, "high": mean + spread}
        for (place, mean), (_, spread) in zip(curves[RANDOM], spreads, strict=True)
    ]
    rivals = [
        {"order": name, at: place, "loss": value}
        for name, curve in found.rivals.items()
        for place, value in points(curve.losses)
    ]
    band = _chart(bands).encode(x=kept, y=alt.Y("low:Q", title=""), y2="high:Q")
    single = _chart(rivals).mark_line(color=PURPLE, opacity=0.35, strokeWidth=1)
    chosen = _chart([{}]).transform_calculate(**{at: str(budget)}).encode(x=kept)
    layers = [
        band.mark_area(color=GREY, opacity=0.25),
        *([single.encode(x=kept, y=loss, detail="order:N")] if rivals else []),
        *_rule(chosen, "this budget", f"{budget} > {middle}", row=1),
        _lines(at, curves, x=kept, y=loss).mark_line(point=True),
    ]
    if found.recommendation:
        place = (sizes or best.counts)[best.counts.index(found.recommendation.num_modules)]
        recommended = _chart([{at: place}]).encode(x=kept)
        layers += _rule(recommended, "recommended", f"{place} > {middle}", row=0, dash=[4, 3])
    what = "parameters" if sizes else "number of modules"
    return alt.layer(*layers).properties(
        width=480,
        height=260,
        description=f"Mask curve: held-out loss against the {what} kept, with other orders",
    )


def _rule(
    base: alt.Chart, text: str, is_late: str, *, row: int, dash: Sequence[int] = (1, 0)
) -> list[alt.Chart]:
    """A vertical rule with a label in this row at its top, to the left if `is_late` is true."""
    align = alt.ExprRef(f"{is_late} ? 'right' : 'left'")
    label = base.mark_text(text=text, align=align, dx=alt.ExprRef(f"{is_late} ? -4 : 4"))
    return [
        base.mark_rule(color=GREY, strokeWidth=1.5, strokeDash=list(dash)),
        label.encode(y=alt.value(8 + 15 * row)),
    ]


def agreement_chart(pairs: Sequence[Agreement], names: Sequence[str]) -> Chart:
    """Jaccard index of every pair, its chance level in brackets; the colour is corrected for it."""
    rows = [
        asdict(pair)
        | {"first": names[first], "second": names[second]}
        | {"text": f"{pair.jaccard:.2f} ({pair.chance_jaccard:.2f})"}
        for pair in pairs
        for first, second in permutations((pair.first, pair.second))
    ]
    measures = {"jaccard": "jaccard", "chance_jaccard": "by chance"}
    measures |= {"corrected": "corrected for chance", "tau": "tau-b"}
    base = _chart(rows).encode(
        x=alt.X("first:N", sort=list(names), title=None, axis=NAMES_ON_TOP),
        y=alt.Y("second:N", sort=list(names), title=None, axis=alt.Axis(labelLimit=220)),
        tooltip=[
            *("first:N", "second:N", "kind:N"),
            *(alt.Tooltip(f"{name}:Q", title=measures[name], format=".3f") for name in measures),
        ],
    )
    shade = alt.Color(
        "corrected:Q",
        scale=alt.Scale(scheme=SCHEME, domain=[0, 1], clamp=True),
        legend=alt.Legend(title=["corrected", "for chance"], gradientLength=110),
    )
    ink = alt.when("datum.corrected > 0.5").then(alt.value("black")).otherwise(alt.value("white"))
    return alt.layer(
        base.mark_rect().encode(color=shade),
        base.mark_text(fontSize=11).encode(text="text:N", color=ink),
    ).properties(
        width=max(180, 80 * len(names)),
        height=44 * len(names),
        description="Agreement of the rankings: Jaccard of their selections, chance in brackets",
    )


def losses_chart(ranking: Ranking) -> Chart | None:
    """Loss by step, with the held-out losses as rules; None if no loss curve is recorded."""
    made_by = ranking.made_by
    stage_1, mask, held_out = made_by.stage_1, made_by.mask, made_by.held_out_loss_nats
    curves = {STAGE_1: stage_1.losses if stage_1 else ()}
    # Without a learning rate the gates are not trained: each loss belongs to another mask.
    if mask and mask.learning_rate is not None:
        curves[STAGE_2] = mask.losses
    shown = {name: enumerate(losses, 1) for name, losses in curves.items() if len(losses) > 1}
    if not shown:
        return None
    loss = alt.Y("loss:Q", title=f"loss, {made_by.loss_unit}", scale=FROM_LOWEST)
    lines = _lines("step", shown, x=alt.X("step:Q", title="step"), y=loss)
    layers = [lines.mark_line()]
    if held_out:
        levels = {"base": held_out.base, "tuned": held_out.tuned}
        rules = [{"loss": level, "text": f"held out, {name}"} for name, level in levels.items()]
        base = _chart(rules).encode(y=loss)
        label = base.mark_text(align="right", dy=-6, fontSize=11)
        layers.append(base.mark_rule(color=GREY, strokeDash=[4, 3]))
        layers.append(label.encode(x=alt.value("width"), text="text:N"))
    return alt.layer(*layers).properties(
        width=480, height=220, description="Losses by step, with held-out losses as rules"
    )


def _lines(at: str, curves: Mapping[str, Iterable[tuple[int, float]]], **axes: Any) -> alt.Chart:
    """Losses by `at`, each curve in the colour and dashes of its name."""
    rows = [
        {"curve": name, at: place, "loss": loss}
        for name, points in curves.items()
        for place, loss in points
    ]
    names = [name for name in LINES if name in curves]
    colours, dashes = zip(*(LINES[name] for name in names), strict=True)
    return _chart(rows).encode(
        color=alt.Color("curve:N", scale=alt.Scale(domain=names, range=colours), legend=ON_TOP),
        strokeDash=alt.StrokeDash("curve:N", scale=alt.Scale(domain=names, range=dashes)),
        tooltip=["curve:N", f"{at}:Q", alt.Tooltip("loss:Q", format=".4f")],
        **axes,
    )


def means_chart(title: str, runs: "pd.DataFrame", means: "pd.DataFrame") -> Chart:
    """Runs as dots, their means as ticks and references as grey ticks, one row per group.

    The groups are named by the columns before `mean`, of which `runs` has a `value` for each run;
    the last column is the reference.
    """
    groups = list(means.columns[: means.columns.get_loc("mean")])

    def rows(table: "pd.DataFrame", columns: Mapping[str, str]) -> alt.InlineData:
        names = table[groups].fillna("-").astype(str).agg(" · ".join, axis=1)
        found = table[[*columns]].rename(columns=columns).assign(group=names).astype(object)
        return alt.InlineData(values=found.where(found.notna(), None).to_dict("records"))

    shown = rows(means, {"mean": "value", means.columns[-1]: "reference"})
    order = [row["group"] for row in shown.values]
    y = alt.Y("group:N", sort=order, title=None, axis=alt.Axis(labelLimit=420))
    x = alt.X("value:Q", title=title, scale=FROM_LOWEST)
    base = alt.Chart(shown).encode(y=y)
    reference = base.transform_filter("isValid(datum.reference)").encode(x=alt.X("reference:Q"))
    dots = alt.Chart(rows(runs, {"value": "value"})).mark_circle(color=BLUE, opacity=0.6)
    return alt.layer(
        reference.mark_tick(color=GREY, thickness=3),
        base.mark_tick(color=BLUE, thickness=2).encode(x=x),
        dots.encode(x=x, y=y),
    ).properties(width=420, height=22 * len(order), description=f"{title}: runs and their means")


def _chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))
