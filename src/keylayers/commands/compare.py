# SPDX-License-Identifier: Apache-2.0
"""`keylayers compare`."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from keylayers.commands import Json, sub_command
from keylayers.errors import ConfigError

if TYPE_CHECKING:
    from keylayers.ranking.ranking import Ranking

app = sub_command("""\
keylayers compare lima/ranking.json alpaca/ranking.json --budget 0.75
keylayers compare seed-0 seed-1 seed-2 --consensus consensus.json
keylayers compare lima alpaca --json | jq '.pairs[0].tau'
""")


@app.default
def compare(
    *rankings: Path, budget: str = "0.3", consensus: Path | None = None, as_json: Json = False
) -> None:
    """Show how far rankings pick the same modules, compared with chance.

    For every pair: Jaccard of the selections at the budget, Kendall's tau-b of all modules, and a
    tau that weighs the top most. Pairs of the same data and other seeds show the ceiling that
    other pairs can be held against. Models of different shape are matched by relative depth.

    Args:
        rankings: Two or more ranking files, or the folders that hold ranking.json.
        budget: Where to compare: 0.3 is the best 30 % of the modules.
        consensus: Also write the ranking by mean relative rank to this file; the rankings must be
            of the same modules.
        as_json: Print JSON for machines: all measures of each pair, and the means by kind.
    """
    from keylayers.commands.console import print_json, stdout
    from keylayers.ranking.budget import parse_budget
    from keylayers.ranking.compare import agreement, mean_by_kind
    from keylayers.ranking.ranking import Ranking
    from keylayers.report.agreement import agreement_notes, agreement_table, kind_table

    if len(rankings) < 2:
        raise ConfigError(f"`compare` must get at least two rankings, got {len(rankings)}")
    loaded = [Ranking.load(path) for path in rankings]
    pairs = agreement(loaded, parse_budget(budget))
    means = mean_by_kind(pairs)
    if consensus is not None:
        _write_consensus(loaded, rankings, consensus)
    if as_json:
        content = {
            "rankings": [str(path) for path in rankings],
            "budget": budget,
            "pairs": [asdict(pair) for pair in pairs],
            "means": [asdict(mean) for mean in means],
        }
        print_json(content)
    else:
        console = stdout()
        names = [str(number) for number in range(1, len(rankings) + 1)]
        for name, path in zip(names, rankings, strict=True):
            console.print(f"{name}  {path}", markup=False)
        console.print("", agreement_table(pairs, names), "", kind_table(means), sep="\n")
        notes = agreement_notes(pairs, names)
        if notes:
            console.print("", *notes, sep="\n", markup=False)
    if consensus is not None:
        stream = sys.stderr if as_json else sys.stdout
        stream.write(f"consensus of {len(loaded)} rankings: {consensus}\n")


def _write_consensus(loaded: "Sequence[Ranking]", paths: Sequence[Path], target: Path) -> None:
    """Write the consensus, but never over its sources or a file that is no ranking."""
    from keylayers.errors import RankingError
    from keylayers.ranking.consensus import consensus
    from keylayers.ranking.ranking import Ranking, ranking_file

    for path in paths:
        if ranking_file(path).resolve() == target.resolve():
            raise ConfigError(
                f"`consensus` must be a new file, but {str(target)!r} is one of the rankings; "
                f"choose another name"
            )
    if target.exists():
        try:
            Ranking.load(target)
        except RankingError:
            raise ConfigError(
                f"`consensus` must be a new file or an earlier ranking, but {str(target)!r} is "
                f"something else; choose another name"
            ) from None
    consensus(loaded).save(target)
