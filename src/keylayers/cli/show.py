# SPDX-License-Identifier: Apache-2.0
"""`keylayers show`."""

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

EXAMPLES = """Examples:

```
keylayers show out/ranking.json
keylayers show out --json | jq '.modules[0].name'
```
"""

JSON = Parameter(name="--json", negative=())
app = App(help_epilogue=EXAMPLES)


@app.default
def show(ranking: Path, /, *, as_json: Annotated[bool, JSON] = False) -> None:
    """Show a ranking: heatmap of blocks by projections, best and worst modules, provenance.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        as_json: For machines: modules best first, with rank, score and all provenance.
    """
    from keylayers.cli.console import stdout
    from keylayers.ranking import Ranking
    from keylayers.report.terminal import ranking_report

    loaded = Ranking.load(ranking)
    if not as_json:
        stdout().print(ranking_report(loaded))
        return
    content = loaded.to_json()
    order = {module.name: place for place, module in enumerate(loaded.ordered())}
    content["modules"].sort(key=lambda module: order[module["name"]])
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
