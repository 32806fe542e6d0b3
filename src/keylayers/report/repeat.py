# SPDX-License-Identifier: Apache-2.0
"""How a ranking was made, as what a person types to make it again. Needs no torch."""

import shlex

from keylayers.options.command_line import command_line
from keylayers.ranking.ranking import Ranking


def how_to_repeat(ranking: Ranking) -> str:
    """The command that made the ranking, or the call where it was made from Python."""
    made_by = ranking.provenance
    options = made_by.get("options", {})
    if options.get("rank_first"):
        return command_line("train", options)
    if "data" in options and "model" in options:
        return command_line("rank", options)
    imported = made_by.get("imported", {})
    if isinstance(imported, dict) and "file" in imported:
        model = str(made_by.get("model", {}).get("name"))
        return shlex.join(["keylayers", "import", str(imported["file"]), "--model", model])
    if ranking.method == "step-scores":
        return "# made by the callback keylayers.StepScores inside a run of your own"
    if ranking.method == "consensus":
        return "# made by keylayers compare RANKING RANKING ... --consensus FILE"
    trainer = made_by.get("trainer", "trainer")
    return f"# made from Python by keylayers.rank_modules on a {trainer}, method {ranking.method}"
