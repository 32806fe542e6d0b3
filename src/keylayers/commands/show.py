# SPDX-License-Identifier: Apache-2.0
"""`keylayers show`."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keylayers.commands import Json, sub_command
from keylayers.errors import ConfigError

if TYPE_CHECKING:
    from keylayers.ranking.budget import Budget
    from keylayers.ranking.ranking import Ranking

app = sub_command("""\
keylayers show out/ranking.json
keylayers show out --budget 17
keylayers show out --html report.html
keylayers show lima alpaca --html both.html --figure heatmap.pdf agreement.svg
keylayers show out --json | jq '.modules[0].name'
""")


@app.default
def show(
    *rankings: Path,
    budget: str = "0.3",
    html: Path | None = None,
    figure: tuple[Path, ...] = (),
    as_json: Json = False,
) -> None:
    """Show a ranking: heatmap of blocks by projections, best and worst modules, provenance.

    Modules that are neither selected nor left out with 95 % confidence are marked. Reports and
    figures also show the ranking's verification, and the agreement of several rankings.

    Args:
        rankings: Ranking files, or the folders that hold ranking.json.
        budget: The selection. 0.3 is the best 30 % of the modules, 17 is 17 modules,
            0.3x-params is 30 % of the parameters.
        html: Write a report instead: a file that opens offline, with a slider for the budget.
        figure: Write figures instead. The file's name says what it shows (heatmap, curve, losses
            or agreement), its ending the format: heatmap.pdf, fig-2-curve.svg, agreement.png.
        as_json: Print JSON for machines: the modules, best first, with rank, score and whether
            their place at the budget is decided, and all provenance.
    """
    from keylayers.commands.console import print_json, stdout
    from keylayers.ranking.budget import parse_budget
    from keylayers.ranking.ranking import Ranking
    from keylayers.report.terminal import ranking_report

    if not rankings:
        raise ConfigError("`show` needs at least one ranking, got none; give its file or folder")
    if as_json and (html is not None or figure or len(rankings) > 1):
        raise ConfigError(
            "`json` must be given with one ranking and without `html` and `figure`; run the "
            "command once for each"
        )
    parsed = parse_budget(budget)
    if html is not None or figure:
        _write_files(rankings, parsed, html, figure)
        return
    loaded = [Ranking.load(path) for path in rankings]
    if as_json:
        print_json(_content(loaded[0], parsed) | {"budget": budget})
        return
    console = stdout()
    for path, ranking in zip(rankings, loaded, strict=True):
        if len(loaded) > 1:
            console.rule(str(path), align="left", characters="─")
        console.print(ranking_report(ranking, budget=parsed))


def _write_files(
    rankings: Sequence[Path], budget: "Budget", html: Path | None, figures: Sequence[Path]
) -> None:
    """Check everything, then make everything, then write it."""
    from keylayers.report.source import missing_for_charts

    if missing := missing_for_charts():
        raise ConfigError(
            f"`html` and `figure` need {', '.join(missing)}, which is not installed; "
            f"`pip install 'keylayers[report]'`"
        )
    from keylayers.commands.console import stdout
    from keylayers.commands.repeat import how_to_repeat
    from keylayers.files import write_bytes
    from keylayers.report.figures import draw_figures, figure_kind
    from keylayers.report.html import render_report
    from keylayers.report.source import load_sources

    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`html` must end in .html, got {str(html)!r}; choose such a name")
    for path in figures:
        figure_kind(path)
    sources = load_sources(rankings)
    contents = {} if html is None else {html: render_report(sources, budget, how_to_repeat)}
    contents |= draw_figures(sources, figures, budget)
    for path, content in contents.items():
        write_bytes(path, content)
        stdout().print(f"{path} written", markup=False)


def _content(ranking: "Ranking", budget: "Budget") -> dict[str, Any]:
    """The ranking file's content, modules best first, each with whether its place is decided."""
    from keylayers.errors import RankingError
    from keylayers.ranking.certainty import decisions

    known: dict[str, bool | None] = {}
    with suppress(RankingError):  # a budget that reaches modules without a score decides nothing
        known = decisions(ranking, budget)
    content = ranking.to_json()
    order = {module.name: place for place, module in enumerate(ranking.ordered())}
    content["modules"].sort(key=lambda module: order[module["name"]])
    for module in content["modules"]:
        module["decided"] = known.get(module["name"])
    return content
