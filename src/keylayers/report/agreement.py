# SPDX-License-Identifier: Apache-2.0
"""The agreement of rankings in the terminal: pairs, means by kind, notes. Needs no torch."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from keylayers.ranking.compare import Agreement, Interval, KindMean


def agreement_table(pairs: Sequence[Agreement], names: Sequence[str]) -> Table:
    """Every pair: its kind, Jaccard, what chance would give, corrected for that, and the taus.

    Brackets hold 95 % intervals. A cell is blank where the measure is not defined or not known.

    Args:
        pairs: As `keylayers.ranking.compare.agreement` gives them.
        names: Of the rankings, by index.
    """
    table = _table("pair", "kind", "Jaccard", "by chance", "corrected", "tau-b", "top-weighted")
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
    """The mean of each measure over the pairs of each kind, one line a kind."""
    table = _table("mean of", "pairs", "Jaccard", "by chance", "corrected", "tau-b", "top-weighted")
    table.columns[1].justify = "right"
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
    """What a reader must know about single pairs, one sentence for all pairs that share it."""
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
    """Two decimals, the interval in brackets; empty where the measure is not defined."""
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


def _table(*titles: str) -> Table:
    """A table without lines whose first two columns are names and whose others are numbers."""
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < 2 else "right", no_wrap=True)
    return table


def _pair_name(pair: Agreement, names: Sequence[str]) -> str:
    return f"{names[pair.first]}, {names[pair.second]}"


def _number(value: float | None, interval: Interval | None = None) -> Text:
    """As Text, for rich reads brackets in a string as markup."""
    return Text(measure(value, interval))
