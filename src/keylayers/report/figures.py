# SPDX-License-Identifier: Apache-2.0
"""The charts of a report as files for papers: PDF, SVG or PNG."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import altair as alt
import vl_convert

from keylayers.errors import ConfigError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.compare import agreement
from keylayers.report import charts
from keylayers.report.source import Source, num_best

AnyChart: TypeAlias = charts.Chart | alt.ConcatChart
FigureKind = Literal["heatmap", "curve", "losses", "agreement"]
KINDS: tuple[FigureKind, ...] = get_args(FigureKind)
FORMATS: Mapping[str, Callable[..., bytes | str]] = {
    ".pdf": vl_convert.vegalite_to_pdf,
    ".svg": vl_convert.vegalite_to_svg,
    ".png": vl_convert.vegalite_to_png,
}
NUM_COLUMNS = 2  # charts next to each other in a figure of several rankings
PIXELS_PER_INCH = 300
# The Vega-Lite release that Altair writes for, in the form that vl-convert takes: `6.4`.
VEGA_LITE = ".".join(alt.VEGALITE_VERSION.lstrip("v").split(".")[:2])
NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def draw_figures(
    sources: Sequence[Source], paths: Sequence[Path], budget: WrittenBudget = 0.3
) -> dict[Path, bytes]:
    """The bytes of each figure's file; a figure of several rankings labels each of them."""
    drawn = {path: _figure(figure_kind(path), sources, budget) for path in paths}
    return {path: drawn_chart(chart, path.suffix.lower()) for path, chart in drawn.items()}


def figure_kind(path: Path) -> FigureKind:
    """The kind of figure that a file name asks for, such as heatmap.pdf or fig-2-curve.svg."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"`figure` must end in {' or '.join(FORMATS)}, got {str(path)!r}; choose one"
        )
    named = [kind for kind in KINDS if kind in path.stem.lower()]
    if len(named) != 1:
        raise ConfigError(
            f"the name of a `figure` must say what it shows, one of {', '.join(KINDS)}, got "
            f"{str(path)!r}; call it {KINDS[0]}{path.suffix} or such"
        )
    return named[0]


def _figure(kind: FigureKind, sources: Sequence[Source], budget: WrittenBudget) -> AnyChart:
    if kind == "agreement":
        if len(sources) < 2:
            raise ConfigError(
                "the figure of an agreement needs at least two rankings, got 1; give more of them"
            )
        pairs = agreement([source.ranking for source in sources], budget)
        return charts.agreement_chart(pairs, [source.label for source in sources])
    if len(sources) == 1:
        return single_chart(kind, sources[0], budget)
    parts = [
        single_chart(kind, source, budget).properties(title=source.label) for source in sources
    ]
    return alt.concat(*parts, columns=NUM_COLUMNS).resolve_scale(color="independent")


def single_chart(kind: FigureKind, source: Source, budget: WrittenBudget) -> charts.Chart:
    """The chart of one ranking: any kind but an agreement."""
    ranking = source.ranking
    if kind == "heatmap":
        if ranking.is_of_parts:
            return charts.ranks_chart(ranking, [ranking.select(budget)], 0)
        return charts.heatmap_chart(ranking, num_best(ranking, budget))
    if kind == "curve":
        if source.verification is None:
            came = "is of an earlier ranking" if source.is_stale else "is missing"
            raise ConfigError(
                f"the figure of a curve needs the verification of {source.path!r}, but it "
                f"{came}; run `keylayers verify`"
            )
        is_of_parts = ranking.is_of_parts
        at = ranking.select(budget).num_parameters if is_of_parts else num_best(ranking, budget)
        return charts.curve_chart(source.verification, at)
    chart = charts.losses_chart(ranking)
    if chart is None:
        raise ConfigError(
            f"the figure of losses needs a ranking whose own run trained, but {source.path!r} "
            f"records none; leave it out"
        )
    return chart


def drawn_chart(chart: AnyChart, suffix: str) -> bytes:
    """A chart as a file in the format of `suffix`, for example `.svg`."""
    options = {"ppi": PIXELS_PER_INCH} if suffix == ".png" else {}
    spec = json.dumps(_drawable(chart.to_dict()))
    drawn = FORMATS[suffix](spec, vl_version=VEGA_LITE, **options)
    return drawn.encode() if isinstance(drawn, str) else drawn


def _drawable(content: Any) -> Any:
    """A copy in which U+FFFD replaces characters that XML forbids: vl-convert aborts on them."""
    if isinstance(content, str):
        return NOT_IN_XML.sub("\ufffd", content)
    if isinstance(content, dict):
        return {key: _drawable(value) for key, value in content.items()}
    return [_drawable(item) for item in content] if isinstance(content, list) else content
