# SPDX-License-Identifier: Apache-2.0
"""Rankings as one HTML file that opens offline: charts, budget slider, table, provenance.

The file contains Vega-Lite and its dependencies, bundled by vl-convert. Names from rankings are
escaped in the page and passed to its scripts as JSON. The content security policy allows only the
page's own scripts, by their hashes, and no connections.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from keylayers._version import __version__
from keylayers.errors import RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.certainty import decisions
from keylayers.ranking.compare import agreement, mean_by_kind
from keylayers.ranking.ranking import Ranking
from keylayers.report.agreement import agreement_notes, measure
from keylayers.report.charts import (
    Chart,
    agreement_chart,
    curve_chart,
    heatmap_chart,
    losses_chart,
    vega_lite_version,
)
from keylayers.report.curve import area_line, reading
from keylayers.report.source import Source, num_best
from keylayers.report.terminal import provenance_lines

CELL_WIDTHS = (30, 64)  # smallest and largest column of a heatmap, in pixels
LABELS_WIDTH = 130  # labels and legend of a heatmap, in pixels


def render_report(
    sources: Sequence[Source], budget: WrittenBudget, how_to_repeat: Callable[[Ranking], str]
) -> bytes:
    """The HTML report of one or several rankings.

    Args:
        sources: The rankings, with their verifications if they have any.
        budget: The budget shown first, which is also that of the agreement.
        how_to_repeat: Returns the command that made a ranking.

    Raises:
        ConfigError: the budget is invalid, or selects other modules than the best ones.
        RankingError: the budget includes modules without a score.
    """
    views = [_view(source, budget, how_to_repeat(source.ranking)) for source in sources]
    pairs = _agreement(sources, budget) if len(sources) > 1 else None
    data = {"rankings": [view.data for view in views], "agreement": pairs and pairs["chart"]}
    libraries = vl_convert.javascript_bundle(vl_version=vega_lite_version())  # type: ignore[call-arg]
    scripts = [libraries, _text("page.js")]
    page = _template().render(
        views=views,
        pairs=pairs,
        budget=budget,
        style=Markup(_text("page.css")),
        data=Markup(_script_json(data)),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        version=__version__,
    )
    return page.encode("utf-8", "replace")  # JSON allows lone surrogates, UTF-8 does not


def page_environment(package: str) -> Environment:
    """The templates in the folder `page` of a package; they escape every value."""
    environment = Environment(
        loader=PackageLoader(package, "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shell"] = shlex.quote
    return environment


def _template() -> Template:
    environment = page_environment("keylayers.report")
    environment.filters["measure"] = measure
    return environment.get_template("page.html")


@dataclass(frozen=True)
class View:
    """What the page shows of one ranking.

    Attributes:
        source: The ranking.
        count: Number of modules in the budget.
        rows: The table, best first.
        lines: Summary of the provenance.
        reading: What the verification says; empty without a verification.
        repeat: The command that made it.
        provenance: The whole provenance as indented JSON.
        data: What the page's script reads.
    """

    source: Source
    count: int
    rows: Sequence[Mapping[str, Any]]
    lines: Sequence[str]
    reading: Sequence[str]
    repeat: str
    provenance: str
    data: Mapping[str, Any]

    @property
    def num_columns(self) -> int:
        """Number of columns of the heatmap."""
        return len(self.source.ranking.projections)

    @property
    def heatmap_widths(self) -> tuple[int, int]:
        """Smallest and largest width of the heatmap, in pixels."""
        least, most = (LABELS_WIDTH + width * self.num_columns for width in CELL_WIDTHS)
        return least, most


def _view(source: Source, budget: WrittenBudget, repeat: str) -> View:
    ranking, found = source.ranking, source.verification
    count = num_best(ranking, budget)
    charts = {"heatmap": _spec(heatmap_chart(ranking, count, is_live=True))}
    if found is not None:
        charts["curve"] = _spec(curve_chart(found, count, is_live=True))
    if (losses := losses_chart(ranking)) is not None:
        charts["losses"] = _spec(losses)
    return View(
        source=source,
        count=count,
        rows=_rows(ranking),
        lines=provenance_lines(ranking),
        reading=[] if found is None else [area_line(found), *reading(found)],
        repeat=repeat,
        provenance=json.dumps(ranking.provenance, indent=2, ensure_ascii=False),
        data={"charts": charts, "budgets": _budgets(ranking), "path": source.path, "count": count},
    )


def _rows(ranking: Ranking) -> list[dict[str, Any]]:
    """One row per module, best first, with the range of budgets for which it is undecided."""
    ranks = ranking.ranks()
    open_at = open_budgets(ranking)
    return [
        {
            "place": place,
            "rank": ranks[module.name],
            "name": module.name,
            "block": module.block_index,
            "projection": module.projection,
            "score": module.score,
            "error": module.standard_error,
            "parameters": module.num_parameters,
            "open": open_at.get(module.name, (0, 0)),
        }
        for place, module in enumerate(ranking.ordered(), start=1)
    ]


def open_budgets(ranking: Ranking) -> dict[str, tuple[int, int]]:
    """Module name -> smallest and largest budget, in modules, for which it is undecided.

    The score at the cut falls as the budget grows, so a module's interval contains it for a single
    range of budgets. Modules that every budget decides are absent.
    """
    found: dict[str, tuple[int, int]] = {}
    for count in range(1, _num_scored(ranking) + 1):
        for name, is_decided in decisions(ranking, count).items():
            if is_decided is False:
                found[name] = (found.get(name, (count, 0))[0], count)
    return found


def _budgets(ranking: Ranking) -> list[dict[str, Any]]:
    """Parameters and cost of each budget, from one module to all that have a score."""
    rows = []
    for count in range(1, _num_scored(ranking) + 1):
        chosen = ranking.select(count)
        rows.append(
            {
                "modules": count,
                "parameters": chosen.num_parameters,
                "cost": ranking.step_time.share(chosen.names),
                "tied": chosen.num_tied_out,
            }
        )
    return rows


def _num_scored(ranking: Ranking) -> int:
    return sum(module.score is not None for module in ranking.modules)


def _agreement(sources: Sequence[Source], budget: WrittenBudget) -> dict[str, Any]:
    """Chart and table of the agreement of every pair, or why they cannot be compared."""
    names = [source.label for source in sources]
    try:
        pairs = agreement([source.ranking for source in sources], budget)
    except RankingError as error:
        return {"chart": None, "refusal": str(error)}
    return {
        "refusal": None,
        "chart": _spec(agreement_chart(pairs, names)),
        "pairs": [(f"{names[pair.first]}, {names[pair.second]}", pair) for pair in pairs],
        "means": mean_by_kind(pairs),
        "notes": agreement_notes(pairs, names),
        "widths": (180 + 70 * len(names), 220 + 130 * len(names)),
    }


def _spec(chart: Chart) -> dict[str, Any]:
    """A chart as Vega-Lite JSON that fills the width of its container."""
    spec = chart.to_dict()
    spec["width"] = "container"
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _script_json(content: Any) -> str:
    """JSON in which no name can close the script element or open a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(name: str) -> str:
    return files("keylayers.report").joinpath("page", name).read_text(encoding="utf-8")
