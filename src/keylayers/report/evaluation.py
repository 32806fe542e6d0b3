# SPDX-License-Identifier: Apache-2.0
"""An evaluation in the terminal: one table of all measures, and sentences about what it shows.

Needs no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from keylayers.evaluation.measures import ALPHA, Difference, Evaluation, Measure, Result
from keylayers.evaluation.statistics import LEVEL, Interval

FEW_DOCUMENTS = 30
MANY_DIFFERENCES = 5
WIDEST = 1000  # columns, for measuring
LOSS = "loss"
SAME = "the same on each"


def evaluation_report(found: Evaluation) -> RenderableType:
    """The table, how to read it, and the notes."""
    return Group(_Fitting(found), Text(), Text("\n".join([*reading(found), *found.notes])))


@dataclass(frozen=True)
class _Fitting:
    """The table, with intervals below their numbers if it is too wide otherwise."""

    found: Evaluation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        wide = _table(self.found, between=" ")
        width = Measurement.get(console, options.update(max_width=WIDEST), wide).maximum
        yield wide if width <= options.max_width else _table(self.found, between="\n")


def _table(found: Evaluation, between: str) -> Table:
    """Measures, with a row for each model; `between` separates a number from its interval."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    table.add_column("value")
    others = [next(iter(found.models))] if len(found.models) > 1 else []
    others += [found.reference] if found.reference is not None else []
    for name in others:
        table.add_column(Text(f"against {name}"))  # a plain string would be read as markup
    for measure in _shown(found):
        indent = "  " * measure.depth
        metric = "nats per token" if measure.metric == LOSS else measure.metric
        title = Text(f"{indent}{measure.task}, {metric}", style="bold")
        table.add_row(title, Text(_about(measure), "dim"))
        for result in measure.results:
            by_name = {own.against: own for own in result.differences}
            cells = [_value(result, measure, between)]
            cells += [_difference(by_name.get(name), measure, between) for name in others]
            table.add_row(Text(f"{indent}  {result.model}"), *cells)
    return table


def _shown(found: Evaluation) -> list[Measure]:
    return [measure for measure in found.measures if measure.is_in_table]


def _about(measure: Measure) -> str:
    """The number of documents, the chance level, and the direction if it is not the usual one."""
    what = "examples" if measure.metric == LOSS else "documents"
    parts = [f"{measure.num_documents:,} {what}"] if measure.num_documents else []
    parts += [f"chance {measure.chance:.3f}"] if measure.chance is not None else []
    parts += ["lower is better"] if measure.higher_is_better is False else []
    return ", ".join(parts)


def _value(result: Result, measure: Measure, between: str) -> Text:
    text = _number(measure, result.value, result.interval, between)
    return Text("\n".join(filter(None, (text, chance_words(measure, result)))))


def _difference(found: Difference | None, measure: Measure, between: str) -> Text:
    if found is None:
        return Text()
    words = difference_words(measure, found)
    interval = None if words == SAME else found.interval
    return Text(f"{_number(measure, found.value, interval, between, '+')}\n{words}")


def _number(
    measure: Measure, value: float, interval: Interval | None, between: str, sign: str = ""
) -> str:
    """A value and its interval: four decimals for a loss, three for a share, else one."""

    def digits(number: float) -> str:
        if measure.metric == LOSS:
            return f"{number:{sign}.4f}"
        return f"{number:{sign}.3f}" if abs(number) < 100 else f"{number:{sign},.1f}"

    if interval is None:
        return digits(value)
    return f"{digits(value)}{between}[{digits(interval.low)}, {digits(interval.high)}]"


def chance_words(measure: Measure, result: Result) -> str:
    """How a value compares with guessing; empty if it is above chance, or if that is unknown."""
    if measure.chance is None or result.interval is None:
        return ""
    if result.interval.holds(measure.chance):
        return "not above chance"
    return "below chance" if result.value < measure.chance else ""


def difference_words(measure: Measure, found: Difference) -> str:
    """What a difference shows."""
    if found.interval is None:
        return "no interval"
    if found.interval.low == found.interval.high == 0:
        return SAME
    if not found.is_shown:
        return "no difference shown"
    if measure.higher_is_better is None:
        return "different"
    return "better" if (found.value > 0) == measure.higher_is_better else "worse"


def reading(found: Evaluation) -> list[str]:
    """What the table shows, in sentences: how it was computed, and how much of it is noise."""
    shown = _shown(found)
    results = [result for measure in shown for result in measure.results]
    compared = [own for result in results for own in result.differences if own.p is not None]
    lines = ["[ ] is a 95 % interval: what another draw of the documents would change"]
    if compared:
        lines[0] += "; other seeds of training are not in it"
        lines.append(
            "a difference is shown if its interval (bootstrap, document by document) leaves out 0 "
            f"and a sign-flip test gives p < {ALPHA}"
        )
    lines += _on_chance(shown)
    lines += _on_multiple_comparisons(compared)
    few = [measure.task for measure in shown if 0 < measure.num_documents < FEW_DOCUMENTS]
    if few:
        names = ", ".join(dict.fromkeys(few))
        lines.append(f"fewer than {FEW_DOCUMENTS} documents, so rough intervals: {names}")
    hidden = {one.task for one in found.measures if not one.is_in_table and one.depth}
    if hidden:
        lines.append(f"{len(hidden)} tasks of these groups are only in evaluation.json")
    return lines


def _on_chance(shown: Sequence[Measure]) -> Iterator[str]:
    """Measures on which no model beats guessing, and how often guessing would seem to win."""
    guessed = [measure for measure in shown if measure.chance is not None]
    lost = [
        measure
        for measure in guessed
        if all(chance_words(measure, result) for result in measure.results)
    ]
    if lost:
        names = ", ".join(dict.fromkeys(measure.task for measure in lost))
        yield f"no model is above chance, so there is nothing to compare: {names}"
    if len(lost) < len(guessed) >= MANY_DIFFERENCES:
        yield (
            f"a model is above chance on {len(guessed) - len(lost)} of {len(guessed)} measures; "
            f"one that guesses would be on {(1 - LEVEL) / 2 * len(guessed):.1f} of them"
        )


def _on_multiple_comparisons(compared: Sequence[Difference]) -> Iterator[str]:
    """How many differences are shown, and how many of them survive Holm's correction."""
    if len(compared) < MANY_DIFFERENCES:
        return
    num_shown = sum(own.is_shown for own in compared)
    text = f"{num_shown} of {len(compared)} differences are shown"
    if num_shown:
        strict = sum(own.is_shown and (own.p_holm or 0) < ALPHA for own in compared)
        text += (
            f", where {ALPHA * len(compared):.1f} would be by chance alone if there were none; "
            f"{'all' if strict == num_shown else strict} of them after Holm's correction for "
            f"{len(compared)} comparisons"
        )
    yield text
