# SPDX-License-Identifier: Apache-2.0
"""Agreement of rankings in the terminal: pairs, means by kind of pair, notes."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from keylayers.ranking.compare import Agreement, Interval, KindMean
from keylayers.report.terminal import plain_table

MEASURES = ("Jaccard", "by chance", "corrected", "tau-b", "top-weighted")


def agreement_table(pairs: Sequence[Agreement], names: Sequence[str]) -> Table:
    """One row per pair: its kind, Jaccard index, chance level, corrected Jaccard index and taus.

    Brackets hold 95 % intervals. A cell is blank if the measure is undefined or unknown.

    Args:
        pairs: What `keylayers.ranking.compare.agreement` returns.
        names: Names of the rankings, by index.
    """
    table = plain_table("pair", "kind", *MEASURES, num_left=2, gap=1)
    for pair in pairs:
        table.add_row(
            Text(_pair_name(pair, names)),
            "" if pair.kind == "unknown" else pair.kind,
            _number(pair.jaccard, pair.jaccard_interval),
            _number(pair.chance_jaccard),
            _number(pair.corrected),
            _number(pair.tau, pair.tau_interval),
            _number(pair.top_weighted_tau),
        )
    return table


def kind_table(means: Sequence[KindMean]) -> Table:
    """One row per kind of pair: the mean of each measure."""
    table = plain_table("mean of", "pairs", *MEASURES, gap=1)
    for mean in means:
        table.add_row(
            "unknown kind" if mean.kind == "unknown" else mean.kind,
            str(mean.num_pairs),
            _number(mean.jaccard),
            _number(mean.chance_jaccard),
            _number(mean.corrected),
            _number(mean.tau),
            _number(mean.top_weighted_tau),
        )
    return table


def agreement_notes(pairs: Sequence[Agreement], names: Sequence[str]) -> list[str]:
    """Remarks on pairs; pairs with the same remark share a line."""
    notes: dict[str, list[str]] = {}
    for pair in pairs:
        for note in _notes_of(pair):
            notes.setdefault(note, []).append(_pair_name(pair, names))
    lines = [f"{'; '.join(owners)}: {note}" for note, owners in notes.items()]
    if any(pair.jaccard_interval or pair.tau_interval for pair in pairs):
        lines.append("[ ] is the 95 % interval from the noise of the batches within each run.")
        lines.append("It does not cover other seeds, and lies low where the noise is large.")
    return lines


def measure(value: float | None, interval: Interval | None = None) -> str:
    """Two decimals, the interval in brackets; empty if the measure is undefined."""
    if value is None:
        return ""
    suffix = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{suffix}"


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


def _pair_name(pair: Agreement, names: Sequence[str]) -> str:
    return f"{names[pair.first]}, {names[pair.second]}"


def _number(value: float | None, interval: Interval | None = None) -> Text:
    """As `Text`, because rich reads brackets in a string as markup."""
    return Text(measure(value, interval))
