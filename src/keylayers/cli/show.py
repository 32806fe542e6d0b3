# SPDX-License-Identifier: Apache-2.0
"""`keylayers show`."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from keylayers.ranking import Ranking
    from keylayers.selection import Budget

EXAMPLES = """Examples:

```
keylayers show out/ranking.json
keylayers show out --budget 17
keylayers show out --json | jq '.modules[0].name'
```
"""

JSON = Parameter(name="--json", negative=())
app = App(help_epilogue=EXAMPLES)


@app.default
def show(ranking: Path, /, *, budget: str = "0.3", as_json: Annotated[bool, JSON] = False) -> None:
    """Show a ranking: heatmap of blocks by projections, best and worst modules, provenance.

    Modules whose place inside or outside the selection the data do not decide are marked.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        budget: Where to mark them: 0.3 is the best 30 % of the modules, 17 is 17 modules,
            0.3x-params is 30 % of the parameters.
        as_json: For machines: modules best first, with rank, score, whether its place at
            the budget is decided, and all provenance.
    """
    from keylayers.cli.console import stdout
    from keylayers.ranking import Ranking
    from keylayers.report.terminal import ranking_report
    from keylayers.selection import parse_budget

    loaded = Ranking.load(ranking)
    parsed = parse_budget(budget)
    if not as_json:
        stdout().print(ranking_report(loaded, budget=parsed))
        return
    content = _content(loaded, parsed) | {"budget": budget}
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def _content(ranking: "Ranking", budget: "Budget") -> dict[str, Any]:
    """The ranking file's content, modules best first, each with whether its place is decided."""
    from keylayers.certainty import decisions
    from keylayers.errors import RankingError

    known: dict[str, bool | None] = {}
    with suppress(RankingError):  # a budget that reaches modules without a score decides nothing
        known = decisions(ranking, budget)
    content = ranking.to_json()
    order = {module.name: place for place, module in enumerate(ranking.ordered())}
    content["modules"].sort(key=lambda module: order[module["name"]])
    for module in content["modules"]:
        module["decided"] = known.get(module["name"])
    return content
