# SPDX-License-Identifier: Apache-2.0
"""Rankings as one HTML file that opens offline: charts, budget slider, table, provenance.

The file contains Vega-Lite and its dependencies, bundled by vl-convert. Names from rankings are
escaped in the page and passed to its scripts as JSON. The content security policy allows only the
page's own scripts, by their hashes, and no connections.
"""

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import vl_convert
from markupsafe import Markup

from keylayers._version import __version__
from keylayers.errors import RankingError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.certainty import undecided
from keylayers.ranking.compare import agreement, mean_by_kind
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.report import charts
from keylayers.report.agreement import agreement_notes, measures, pair_name
from keylayers.report.curve import carried_near, reading
from keylayers.report.figures import VEGA_LITE
from keylayers.report.source import Source, module_rows, num_best
from keylayers.report.templates import page_templates
from keylayers.report.terminal import provenance_lines

NUM_POSITIONS = 60  # of the slider over parameters
BUDGET = "budget"  # the charts' parameter that the slider sets: number of selected modules


def render_report(
    sources: Sequence[Source], budget: WrittenBudget, how_to_repeat: Callable[[Ranking, str], str]
) -> bytes:
    """The HTML report of rankings at a budget; `how_to_repeat` is the command that writes one."""
    views = [
        _view(source, budget, how_to_repeat(source.ranking, source.path)) for source in sources
    ]
    pairs = _agreement(sources, budget) if len(sources) > 1 else None
    data = {"rankings": [view["data"] for view in views], "agreement": pairs and pairs["chart"]}
    libraries = vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # type: ignore[call-arg]
    environment = page_templates(autoescape=True)
    has_parts = any(view["is_of_parts"] for view in views)
    script = environment.get_template("page.js").render(has_parts=has_parts)
    scripts = [libraries, script + "\n"]  # Jinja takes the last line break
    environment.filters["shell"] = shlex.quote
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    page = environment.get_template("page.html").render(
        views=views,
        pairs=pairs,
        budget=budget,
        data=data,
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        version=__version__,
    )
    return page.encode("utf-8", "replace")  # JSON allows lone surrogates, UTF-8 does not


def _view(source: Source, budget: WrittenBudget, repeat: str) -> dict[str, Any]:
    """What the page shows of one ranking; its script reads `data`."""
    ranking, found = source.ranking, source.verification
    if ranking.is_of_parts:
        chosen, position = _parts_budgets(ranking, budget)
        heatmap = charts.ranks_chart(ranking, chosen, BUDGET)
        at = f"[{','.join(str(one.num_parameters) for one in chosen)}][{BUDGET}]"
        budgets = [_parts_budget(source, one) for one in chosen]
    else:
        position, at = num_best(ranking, budget), BUDGET
        heatmap = charts.heatmap_chart(ranking, BUDGET)
        budgets = _budgets(ranking)
    drawn = {
        "heatmap": heatmap,
        "losses": charts.losses_chart(ranking),
        "curve": found and charts.curve_chart(found, at),
    }
    return {
        "source": source,
        "is_of_parts": ranking.is_of_parts,
        "count": position,
        "rows": module_rows(ranking),
        "open": {} if ranking.is_of_parts else open_budgets(ranking),
        "lines": provenance_lines(ranking),
        "reading": reading(found) if found else [],
        "repeat": repeat,
        "provenance": json.dumps(ranking.provenance, indent=2, ensure_ascii=False),
        "data": {
            "is_of_parts": ranking.is_of_parts,
            "charts": {name: _spec(chart, position) for name, chart in drawn.items() if chart},
            "budgets": budgets,
            "count": position,
        },
    }


def _parts_budget(source: Source, chosen: Selection) -> dict[str, Any]:
    """What a budget of rank-one parts buys: the rank of each module, best first, and the gain."""
    ranks, size = chosen.ranks or {}, chosen.num_parameters
    return {
        "budget": chosen.budget,
        "parts": chosen.num_parts,
        "parameters": size,
        "ranks": [ranks.get(module.name, 0) for module in source.ranking.ordered()],
        "carried": source.verification and carried_near(source.verification, size),
    }


def _parts_budgets(ranking: Ranking, budget: WrittenBudget) -> tuple[list[Selection], int]:
    """Selections from one part to all in equal factors of parameters, and the place of `budget`.

    `budget` itself takes the place of the nearest one.
    """
    wanted, least = ranking.select(budget), ranking.select(1)
    whole = wanted.num_candidate_parameters
    smallest = least.num_parameters / whole
    shares = [smallest ** (1 - place / (NUM_POSITIONS - 1)) for place in range(1, NUM_POSITIONS)]
    chosen = [least, *(ranking.select(f"{_written(share)}x-params") for share in shares)]
    own = math.log(wanted.num_parameters)
    position = min(
        range(len(chosen)), key=lambda place: abs(math.log(chosen[place].num_parameters) - own)
    )
    if position < len(chosen) - 1:  # the last one stays all parts
        chosen[position] = wanted
    return chosen, position


def _written(share: float) -> str:
    """A share with three digits, rounded up, without an exponent."""
    digits = 2 - math.floor(math.log10(share))
    return f"{min(1.0, math.ceil(share * 10**digits) / 10**digits):.{digits}f}"


def open_budgets(ranking: Ranking) -> dict[str, tuple[int, int]]:
    """Module name -> smallest and largest budget, in modules, for which it is undecided.

    As the score at the cut falls with the budget, it is a single range. Absent if all decide.
    """
    found: dict[str, tuple[int, int]] = {}
    for count in range(1, _num_scored(ranking) + 1):
        for name in undecided(ranking, count):
            found[name] = (found.get(name, (count, 0))[0], count)
    return found


def _budgets(ranking: Ranking) -> list[dict[str, Any]]:
    """Parameters and cost of each budget, from one module to all that have a score."""
    return [
        {
            "parameters": chosen.num_parameters,
            "cost": ranking.step_time.share(chosen.names),
            "tied": chosen.num_tied_out,
        }
        for chosen in map(ranking.select, range(1, _num_scored(ranking) + 1))
    ]


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
        "chart": _spec(charts.agreement_chart(pairs, names)),
        "pairs": [(pair_name(pair, names), pair.kind, measures(pair)) for pair in pairs],
        "means": [(mean.num_pairs, mean.kind, measures(mean)) for mean in mean_by_kind(pairs)],
        "notes": agreement_notes(pairs, names),
    }


def _spec(chart: charts.Chart, count: int = 0) -> dict[str, Any]:
    """A chart as Vega-Lite JSON that fills the width of its container."""
    return chart.to_dict() | {
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "params": [{"name": BUDGET, "value": count}],
    }


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
