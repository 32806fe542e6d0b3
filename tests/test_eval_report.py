# SPDX-License-Identifier: Apache-2.0
"""How an evaluation is shown: words for what is noise, at any width, with any names."""

import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from eval_files import evaluation_of
from keylayers.evaluation.documents import Measured
from keylayers.evaluation.measures import Difference, Measure, Part, Result, correct, measures_of
from keylayers.evaluation.statistics import Interval
from keylayers.report.evaluation import chance_words, difference_words, evaluation_report, reading

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
RECORD = EXPERIMENTS / "records" / "evaluation_english_2m_mmlu.json"


def rendered(found, width):
    """The lines of the report as a terminal of this width shows them."""
    console = Console(file=StringIO(), width=width)
    console.print(evaluation_report(found))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def measures(values, metric=None):
    """Measures of tasks of one metric, from the values of each model."""
    found = {
        model: {
            task: Measured(task, documents(task, own), {"acc": sum(own) / len(own)}, {"acc": True})
            for task, own in tasks.items()
        }
        for model, tasks in values.items()
    }
    parts = [Part(task, (task,), metric) for task in values["base model"]]
    made = [one for part in parts for one in measures_of(part, found, None, 0)]
    correct(made)
    return made


def documents(task, values):
    rows = {"task": task, "metric": "acc", "document": range(len(values)), "document_sha256": "x"}
    return pd.DataFrame(rows | {"value": values, "size": 1.0, "chance": math.nan})


def test_documents_that_only_some_models_have_give_no_interval():
    """As where a task leaves out answers that it cannot score."""
    for num in (9, 8):
        values = {"base model": {"t": [0.5] * 9}, "a": {"t": [0.5] * num}}
        [found] = measures(values)
        has_none = found.results[1].differences[0].interval is None
        assert (found.num_documents, has_none) == ((9, False) if num == 9 else (0, True))
    assert measures(values, "acc") == []


def test_what_has_no_interval_is_no_comparison():
    """One document has no interval, so its difference is none of those that Holm corrects."""
    sizes = {"one": 1} | {f"many {number}": 40 for number in range(5)}
    values = {
        model: {task: [value] * size for task, size in sizes.items()}
        for model, value in (("base model", 0.0), ("a", 1.0))
    }
    found = measures(values)
    one, *many = [measure.results[1].differences[0] for measure in found]
    assert one.interval is one.p is one.p_holm is None
    assert [each.p_holm for each in many] == [5 * each.p for each in many]
    shown = reading(replace(evaluation_of(RECORD), measures=tuple(found)))
    assert any("Holm's correction for 5 comparisons" in line for line in shown)


TAKEN = [
    (Part("g", ()), {"acc", "acc (strict)", "acc_norm", "f1"}),
    (Part("g", (), "acc"), {"acc", "acc (strict)"}),
    (Part("g", (), "acc", ["none"]), {"acc"}),
    (Part("g", (), "acc", ["strict"]), {"acc (strict)"}),
]


@pytest.mark.parametrize(("part", "names"), TAKEN)
def test_a_group_averages_one_metric_with_some_filters(part, names):
    assert set(filter(part.takes, ("acc", "acc (strict)", "acc_norm", "f1"))) == names


def test_a_rate_of_no_spread_is_said_to_be_the_same():
    same = Difference("base model", 0.0, Interval(0.0, 0.0, "bootstrap"), 1.0, 1.0)
    result = Result("a", 0.1, Interval(0.02, 0.2, "exact"), (same,))
    one = Measure("t", "acc", 50, 0.25, True, (result,))
    assert difference_words(one, same) == "the same on each"
    assert chance_words(one, result) == "below chance"
    worse = Difference("base model", -0.1, Interval(-0.2, -0.05, "bootstrap"), 0.01, 0.01)
    assert difference_words(one, worse) == "worse"
    assert difference_words(replace(one, higher_is_better=False), worse) == "better"


def test_the_log_shows_what_the_record_holds():
    log = (EXPERIMENTS / "LOG.md").read_text()
    entry = log.split("## 2026-11-25: two adapters of the 2 M model")[1]
    shown = entry.split("```")[1].strip("\n").splitlines()
    assert len(shown) > 30
    assert set(shown) <= set(rendered(evaluation_of(RECORD), 120))


def test_a_narrow_terminal_breaks_no_interval():
    wide, narrow = ("\n".join(rendered(evaluation_of(RECORD), width)) for width in (120, 80))
    intervals = re.compile(r"\[[-+]?\d\.\d+, [-+]?\d\.\d+\]")
    assert len(intervals.findall(wide)) > 40
    assert sorted(intervals.findall(narrow)) == sorted(intervals.findall(wide))


def test_names_are_no_markup(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(RECORD.read_text().replace("alpaca-all", "[red]x[/y]"))
    lines = rendered(evaluation_of(path), 140)
    assert any("against [red]x[/y]" in line for line in lines)
    assert any(line.startswith("  [red]x[/y]") for line in lines)
