# SPDX-License-Identifier: Apache-2.0
"""Agreement of rankings in the terminal: pairs, means by kind of pair, notes."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from keylayers.ranking.compare import Agreement, KindMean
from keylayers.report.terminal import plain_table

MEASURES = ("Jaccard", "by chance", "corrected", "tau-b", "top-weighted")


def agreement_table(pairs: Sequence[Agreement], names: Sequence[str]) -> Table:
    """One row per pair of rankings; `names` are those of the rankings, by index."""
    table = plain_table("pair", "kind", *MEASURES, num_left=2, gap=1)
    for pair in pairs:
        kind = "" if pair.kind == "unknown" else pair.kind
        table.add_row(*map(Text, (pair_name(pair, names), kind, *measures(pair))))
    return table


def kind_table(means: Sequence[KindMean]) -> Table:
    """One row per kind of pair: the mean of each measure."""
    table = plain_table("mean of", "pairs", *MEASURES, gap=1)
    for mean in means:
        kind = "unknown kind" if mean.kind == "unknown" else mean.kind
        table.add_row(kind, str(mean.num_pairs), *map(Text, measures(mean)))
    return table


def measures(found: Agreement | KindMean) -> list[str]:
    """The cells of a row, with 95 % intervals in brackets; empty if undefined or unknown."""
    values = [found.jaccard, found.chance_jaccard, found.corrected, found.tau]
    cells = ["" if v is None else f"{v:.2f}" for v in (*values, found.top_weighted_tau)]
    if isinstance(found, Agreement):
        for place, interval in ((0, found.jaccard_interval), (3, found.tau_interval)):
            if cells[place] and interval is not None:
                cells[place] += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return cells


def pair_name(pair: Agreement, names: Sequence[str]) -> str:
    """The names of both rankings."""
    return f"{names[pair.first]}, {names[pair.second]}"


def agreement_notes(pairs: Sequence[Agreement], names: Sequence[str]) -> list[str]:
    """Remarks on pairs; pairs with the same remark share a line."""
    notes: dict[str, list[str]] = {}
    for pair in pairs:
        for note in _notes_of(pair):
            notes.setdefault(note, []).append(pair_name(pair, names))
    lines = [f"{'; '.join(owners)}: {note}" for note, owners in notes.items()]
    if any(pair.jaccard_interval or pair.tau_interval for pair in pairs):
        lines.append("[ ] is the 95 % interval from the noise of the batches within each run.")
        lines.append("It does not cover other seeds, and lies low where the noise is large.")
    return lines


def _notes_of(pair: Agreement) -> list[str]:
    notes = []
    if pair.is_by_depth:
        notes.append(
            f"other modules, matched by projection and relative depth on {pair.num_modules}"
        )
    if pair.left_out:
        notes.append(f"left out, as only one of the two has it: {', '.join(pair.left_out)}")
    if pair.is_chance_of_groups:
        notes.append("by chance: random orders of whole blocks or projections, as both rank those")
    if pair.num_scored < pair.num_modules:
        notes.append(f"tau of the {pair.num_scored} of {pair.num_modules} modules that both score")
    return notes
