# SPDX-License-Identifier: Apache-2.0
"""An evaluation in the terminal: all measures of all models in one table, and what they show.

Needs no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from keylayers.evaluation.measures import Difference, Measure, Result
from keylayers.evaluation.record import Evaluation
from keylayers.evaluation.statistics import LEVEL, Interval

FEW_DOCUMENTS = 30
MANY_DIFFERENCES = 5
WIDEST = 1000  # columns, for measuring
LOSS = "loss"
NO_DIFFERENCE = "no difference shown"
SAME = "the same on each"


def evaluation_report(found: Evaluation) -> RenderableType:
    """All of an evaluation that a terminal shows."""
    parts: list[RenderableType] = [_Fitting(found)]
    parts += [Text(), Text("\n".join([*reading(found), *found.notes]))]
    return Group(*parts)


@dataclass(frozen=True)
class _Fitting:
    """The table as wide as it is, or with intervals under their numbers where that is too wide."""

    found: Evaluation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        wide = evaluation_table(self.found)
        width = Measurement.get(console, options.update(max_width=WIDEST), wide).maximum
        yield wide if width <= options.max_width else evaluation_table(self.found, between="\n")


def evaluation_table(found: Evaluation, between: str = " ") -> Table:
    """A block a measure, a row a model: value, and differences on the same documents.

    Args:
        found: What is shown.
        between: What stands between a number and its interval.
    """
    shown = [one for one in found.measures if one.is_in_table]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    table.add_column("value")
    base = next(iter(found.models))
    others = [base] if len(found.models) > 1 else []
    others += [found.reference] if found.reference is not None else []
    for name in others:
        table.add_column(Text(f"against {name}"))  # brackets in a string would be markup
    for measure in shown:
        indent = "  " * measure.depth
        table.add_row(Text(f"{indent}{title(measure)}", style="bold"), Text(about(measure), "dim"))
        for result in measure.results:
            cells = [_value(result, measure, between)]
            by_name = {one.against: one for one in result.differences}
            cells += [_difference(by_name.get(name), measure, between) for name in others]
            table.add_row(Text(f"{indent}  {result.model}"), *cells)
    return table


def title(measure: Measure) -> str:
    """What is measured."""
    if measure.metric == LOSS:
        return f"{measure.task}, nats per token"
    return f"{measure.task}, {measure.metric}"


def about(measure: Measure) -> str:
    """How many documents it is a mean over, and what guessing gives."""
    parts = []
    if measure.num_documents:
        parts.append(f"{measure.num_documents:,} {_documents(measure)}")
    if measure.chance is not None:
        parts.append(f"chance {measure.chance:.3f}")
    if measure.higher_is_better is False:
        parts.append("lower is better")
    return ", ".join(parts)


def _documents(measure: Measure) -> str:
    return "examples" if measure.metric == LOSS else "documents"


def chance_words(measure: Measure, result: Result) -> str:
    """How a value stands to guessing; empty where it is above, or nothing is known."""
    if measure.chance is None or result.interval is None:
        return ""
    if result.interval.holds(measure.chance):
        return "not above chance"
    return "below chance" if result.value < measure.chance else ""


def difference_words(measure: Measure, one: Difference) -> str:
    """What a difference shows."""
    if one.interval is None:
        return "no interval"
    if one.interval.low == one.interval.high == 0:
        return SAME
    if not one.is_shown:
        return NO_DIFFERENCE
    if measure.higher_is_better is None:
        return "different"
    return "better" if (one.value > 0) == measure.higher_is_better else "worse"


def _value(result: Result, measure: Measure, between: str) -> Text:
    words = chance_words(measure, result)
    text = _digits(measure, result.value) + _brackets(measure, result.interval, between)
    return Text(f"{text}\n{words}" if words else text)


def _difference(one: Difference | None, measure: Measure, between: str) -> Text:
    if one is None:
        return Text()
    words = difference_words(measure, one)
    text = _digits(measure, one.value, sign="+")
    if words != SAME:
        text += _brackets(measure, one.interval, between, sign="+")
    return Text(f"{text}\n{words}")


def _brackets(measure: Measure, interval: Interval | None, between: str, sign: str = "") -> str:
    if interval is None:
        return ""
    low, high = (_digits(measure, one, sign) for one in (interval.low, interval.high))
    return f"{between}[{low}, {high}]"


def _digits(measure: Measure, value: float, sign: str = "") -> str:
    """Four digits of a loss, three of a share; other numbers as they are."""
    if measure.metric == LOSS:
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def reading(found: Evaluation) -> list[str]:
    """What the table shows, in sentences: how it was computed, and how much of it is noise."""
    shown = [one for one in found.measures if one.is_in_table]
    lines = ["[ ] is a 95 % interval: what another draw of the documents would change"]
    differences = [
        one
        for measure in shown
        for result in measure.results
        for one in result.differences
        if one.p is not None
    ]
    if differences:
        lines[0] += "; other seeds of training are not in it"
        lines.append(
            "a difference is shown if its interval (bootstrap, document by document) leaves out 0 "
            "and a sign-flip test gives p < 0.05"
        )
    lines += _of_chance(shown)
    lines += _of_many(differences)
    few = [one for one in shown if 0 < one.num_documents < FEW_DOCUMENTS]
    if few:
        names = ", ".join(dict.fromkeys(one.task for one in few))
        lines.append(f"fewer than {FEW_DOCUMENTS} documents, so rough intervals: {names}")
    hidden = len({one.task for one in found.measures if not one.is_in_table and one.depth})
    if hidden:
        lines.append(f"{hidden} tasks of these groups stand in evaluation.json")
    return lines


def _of_chance(shown: Sequence[Measure]) -> list[str]:
    """Where no model is better than guessing, and how often one would seem to be."""
    guessed = [one for one in shown if one.chance is not None]
    lost = [one for one in guessed if all(chance_words(one, result) for result in one.results)]
    lines = []
    if lost:
        names = ", ".join(dict.fromkeys(one.task for one in lost))
        lines.append(f"no model is above chance, so there is nothing to compare: {names}")
    if len(lost) < len(guessed) >= MANY_DIFFERENCES:
        lines.append(
            f"a model is above chance on {len(guessed) - len(lost)} of {len(guessed)} measures; "
            f"one that guesses would be on {(1 - LEVEL) / 2 * len(guessed):.1f} of them"
        )
    return lines


def _of_many(differences: Sequence[Difference]) -> list[str]:
    """How many differences there are, and how many of them survive their number."""
    if len(differences) < MANY_DIFFERENCES:
        return []
    num_shown = sum(one.is_shown for one in differences)
    strict = sum(one.is_shown and (one.p_holm or 0) < 0.05 for one in differences)
    text = f"{num_shown} of {len(differences)} differences are shown"
    if not num_shown:
        return [text]
    remain = f"; {strict} of them" if strict != num_shown else "; all of them"
    by_chance = 0.05 * len(differences)
    return [
        f"{text}, where {by_chance:.1f} would be by chance alone if there were none{remain} after "
        f"Holm's correction for {len(differences)} comparisons"
    ]
