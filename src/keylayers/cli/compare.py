# SPDX-License-Identifier: Apache-2.0
"""`keylayers compare`."""

from pathlib import Path

from cyclopts import App

from keylayers.errors import ConfigError

EXAMPLES = """Examples:

```
keylayers compare lima/ranking.json alpaca/ranking.json --budget 0.75
```
"""

app = App(help_epilogue=EXAMPLES)


@app.default
def compare(*rankings: Path, budget: str = "0.3") -> None:
    """Show how far rankings pick the same modules, beside what chance would give.

    Args:
        rankings: Two or more ranking files of the same modules.
        budget: Where to compare: 0.3 is the best 30 % of the modules.
    """
    from keylayers.cli.console import stdout
    from keylayers.compare import agreement
    from keylayers.ranking import Ranking
    from keylayers.report.terminal import agreement_table
    from keylayers.selection import parse_budget

    if len(rankings) < 2:
        raise ConfigError(f"`compare` must get at least two rankings, got {len(rankings)}")
    loaded = [Ranking.load(path) for path in rankings]
    pairs = agreement(loaded, parse_budget(budget))
    console = stdout()
    for number, path in enumerate(rankings, start=1):
        console.print(f"{number}  {path}", markup=False)
    console.print(agreement_table(pairs, [str(number + 1) for number in range(len(rankings))]))
