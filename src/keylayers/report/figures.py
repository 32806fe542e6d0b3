# SPDX-License-Identifier: Apache-2.0
"""The charts of a report as files for papers: PDF, SVG or PNG."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import altair as alt
import vl_convert

from keylayers.errors import ConfigError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.compare import agreement
from keylayers.report.charts import (
    Chart,
    agreement_chart,
    curve_chart,
    heatmap_chart,
    losses_chart,
    vega_lite_version,
)
from keylayers.report.source import Source, num_best

Kind = Literal["heatmap", "curve", "losses", "agreement"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NUM_COLUMNS = 2  # charts next to each other in a figure of several rankings
PIXELS_PER_INCH = 300
NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def draw_figures(
    sources: Sequence[Source], paths: Sequence[Path], budget: WrittenBudget = 0.3
) -> dict[Path, bytes]:
    """The bytes of each figure's file.

    Args:
        sources: The rankings, with their verifications if they have any. With several rankings, a
            figure shows each under its label.
        paths: A file's name contains one of `KINDS`, its suffix is the format: heatmap.pdf,
            fig-2-curve.svg, agreement.png.
        budget: The budget shown, which is also that of the agreement.

    Raises:
        ConfigError: a name without a kind, with several kinds or with an unknown format; a curve
            without a verification; an agreement of one ranking; an invalid budget.
        RankingError: the budget includes modules without a score, or two rankings share no module.
    """
    return {path: _drawn(path, sources, budget) for path in paths}


def figure_kind(path: Path) -> Kind:
    """The kind of figure that a file name asks for.

    Raises:
        ConfigError: it contains none of `KINDS` or several, or its format is unknown.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"`figure` must end in {' or '.join(_FORMATS)}, got {str(path)!r}; choose one"
        )
    named = [kind for kind in KINDS if kind in path.stem.lower()]
    if len(named) != 1:
        raise ConfigError(
            f"the name of a `figure` must say what it shows, one of {', '.join(KINDS)}, got "
            f"{str(path)!r}; call it {KINDS[0]}{path.suffix} or such"
        )
    return named[0]


def _drawn(path: Path, sources: Sequence[Source], budget: WrittenBudget) -> bytes:
    kind = figure_kind(path)
    if kind == "agreement":
        chart: Chart | alt.ConcatChart = _agreement(sources, budget)
    elif len(sources) == 1:
        chart = _single(kind, sources[0], budget)
    else:
        charts = [
            _single(kind, source, budget).properties(title=source.label) for source in sources
        ]
        chart = alt.concat(*charts, columns=NUM_COLUMNS).resolve_scale(color="independent")
    return drawn_chart(chart, path.suffix.lower())


def drawn_chart(chart: Chart | alt.ConcatChart, suffix: str) -> bytes:
    """A chart as a file in the format of `suffix`, for example `.svg`."""
    return _FORMATS[suffix](json.dumps(_drawable(chart.to_dict())))


def _drawable(content: Any) -> Any:
    """A copy in which U+FFFD replaces characters that XML forbids: vl-convert aborts on them."""
    if isinstance(content, str):
        return NOT_IN_XML.sub("\ufffd", content)
    if isinstance(content, dict):
        return {key: _drawable(value) for key, value in content.items()}
    return [_drawable(item) for item in content] if isinstance(content, list) else content


def _single(kind: Kind, source: Source, budget: WrittenBudget) -> Chart:
    count = num_best(source.ranking, budget)
    if kind == "heatmap":
        return heatmap_chart(source.ranking, count)
    if kind == "curve":
        if source.verification is None:
            came = "is of an earlier ranking" if source.is_stale else "is missing"
            raise ConfigError(
                f"the figure of a curve needs the verification of {source.path!r}, but it "
                f"{came}; run `keylayers verify`"
            )
        return curve_chart(source.verification, count)
    chart = losses_chart(source.ranking)
    if chart is None:
        raise ConfigError(
            f"the figure of losses needs a ranking whose own run trained, but {source.path!r} "
            f"records none; leave it out"
        )
    return chart


def _agreement(sources: Sequence[Source], budget: WrittenBudget) -> Chart:
    if len(sources) < 2:
        raise ConfigError(
            "the figure of an agreement needs at least two rankings, got 1; give more of them"
        )
    pairs = agreement([source.ranking for source in sources], budget)
    return agreement_chart(pairs, [source.label for source in sources])


def _svg(spec: str) -> bytes:
    return vl_convert.vegalite_to_svg(spec, vl_version=vega_lite_version()).encode("utf-8")


_FORMATS: Mapping[str, Callable[[str], bytes]] = {
    ".pdf": partial(vl_convert.vegalite_to_pdf, vl_version=vega_lite_version()),
    ".svg": _svg,
    ".png": partial(
        vl_convert.vegalite_to_png, vl_version=vega_lite_version(), ppi=PIXELS_PER_INCH
    ),
}
