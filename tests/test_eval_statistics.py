# SPDX-License-Identifier: Apache-2.0
"""Intervals, tests and corrections of an evaluation, by hand and by independent means."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from keylayers.evaluation.measures import Difference
from keylayers.evaluation.statistics import (
    Documents,
    difference_interval,
    holm,
    interval,
    sign_flip_p,
)


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
