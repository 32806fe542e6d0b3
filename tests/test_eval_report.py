# SPDX-License-Identifier: Apache-2.0
"""Statistics of an evaluation, by hand and by independent means, and how they are shown."""

import math
import re
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from eval_files import evaluation_of
from keylayers.evaluation.documents import Measured
from keylayers.evaluation.measures import Difference, Measure, Part, Result, correct, measures_of
from keylayers.evaluation.statistics import (
    Documents,
    Interval,
    difference_interval,
    holm,
    interval,
    sign_flip_p,
)
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
            task: Measured(task, rows_of(task, own), {"acc": sum(own) / len(own)}, {"acc": True})
            for task, own in tasks.items()
        }
        for model, tasks in values.items()
    }
    parts = [Part(task, (task,), metric) for task in values["base model"]]
    made = [one for part in parts for one in measures_of(part, found, None, 0)]
    correct(made)
    return made


def rows_of(task, values):
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


def documents(values, sizes=None, strata=None, weights=(1.0,)):
    values = np.asarray(values, float)
    sizes = np.ones(len(values)) if sizes is None else np.asarray(sizes, float)
    strata = np.zeros(len(values), int) if strata is None else np.asarray(strata)
    return Documents(values, sizes, strata, np.asarray(weights, float))


MEANS = {
    "nats of all over tokens of all, not the mean of 2 and 2": (([6, 2], [3, 1]), 8 / 4),
    "tasks": (([1, 0, 0, 1, 1], None, [0, 0, 0, 1, 1], [0.5, 0.5]), (1 / 3 + 1) / 2),
    "documents": (([1, 0, 0, 1, 1], None, [0, 0, 0, 1, 1], [0.6, 0.4]), 3 / 5),
}


@pytest.mark.parametrize(("given", "mean"), MEANS.values(), ids=MEANS)
def test_the_mean_is_worked_out_by_hand(given, mean):
    found = documents(*given)
    assert found.mean() == pytest.approx(mean)
    assert found.parts().sum() == pytest.approx(mean)


def test_a_share_has_the_exact_interval_of_the_binomial():
    found = interval(documents([1] * 7 + [0] * 13))
    # Clopper and Pearson's by quantiles of the beta distribution
    ends = stats.beta.ppf([0.025, 0.975], [7, 8], [14, 13])
    assert found.method == "exact"
    assert [found.low, found.high] == pytest.approx(ends)


def test_other_means_have_the_interval_of_a_bootstrap_within_each_stratum():
    draw = np.random.default_rng(0)
    values, sizes = draw.normal(3, 1, 60), draw.integers(1, 9, 60)
    strata = np.repeat([0, 1], 30)
    found = interval(documents(values, sizes, strata, [0.25, 0.75]), seed=1)

    def drawn(stratum):
        chosen = draw.choice(np.flatnonzero(strata == stratum), 30)
        return values[chosen].sum() / sizes[chosen].sum()

    own = [0.25 * drawn(0) + 0.75 * drawn(1) for _ in range(4000)]
    low, high = np.quantile(own, [0.025, 0.975])
    assert found.method == "bootstrap"
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.1 * (high - low))


def test_one_document_has_no_interval_and_equal_ones_have_no_width():
    assert interval(documents([1.0])) is None
    assert interval(documents([1, 0, 1], strata=[0, 0, 1], weights=[0.5, 0.5])) is None
    same = difference_interval(documents([0.0] * 9))
    assert (same.low, same.high) == (0.0, 0.0)


@pytest.mark.parametrize("values", [[1, 1, 1, 1, 0, 0], [0.5, -0.25, 0.125, 0, 1.0, 0.3, 0.4]])
def test_the_sign_flip_test_counts_all_flips_in_any_unit(values):
    """A loss is divided by the tokens of all examples, so its parts may be very small."""
    flips = [abs(np.dot(signs, values)) for signs in product((-1, 1), repeat=len(values))]
    share = np.mean([one >= abs(sum(values)) - 1e-12 for one in flips])
    found = sign_flip_p(documents(values))
    assert found == pytest.approx(share)
    assert found == sign_flip_p(documents(values, sizes=[1e9] * len(values)))
    assert found == sign_flip_p(documents(1e-12 * np.array(values)))


def test_of_right_and_wrong_answers_it_is_mcnemars_test():
    values = [1] * 9 + [-1] * 2 + [0] * 100
    assert sign_flip_p(documents(values)) == pytest.approx(stats.binomtest(2, 11).pvalue)
    assert sign_flip_p(documents([0.0] * 5)) == 1.0


def difference(values, seed=0):
    found = documents(values)
    return Difference("base", found.mean(), difference_interval(found, seed), sign_flip_p(found))


def test_four_documents_of_three_hundred_show_no_difference():
    """All go one way, so the bootstrap's interval leaves out 0; four coins often do so too."""
    few = difference([1.0] * 4 + [0.0] * 296)
    assert few.interval.low > 0
    assert few.p == 0.125
    assert not few.is_shown
    assert difference([1.0] * 8 + [0.0] * 292).is_shown


def test_models_that_are_alike_are_seldom_shown_to_differ():
    draw = np.random.default_rng(0)
    drawn = [draw.choice([-1, 0, 1], 60, p=[0.05, 0.9, 0.05]) for _ in range(100)]
    assert sum(difference(values, seed).is_shown for seed, values in enumerate(drawn)) <= 5


def test_holms_correction_is_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
