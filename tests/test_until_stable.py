# SPDX-License-Identifier: Apache-2.0
"""Stop when the selection at the wanted budget no longer changes."""

import itertools
from statistics import fmean

import pytest

from keylayers.scores.options import EliminationOptions
from keylayers.scores.task import ModuleScores, PartScores, Task
from keylayers.scores.until_stable import StableSelection, repeated
from keylayers.trainers.log import TrainerLog
from scored import noisy, planted, score


def test_a_selection_is_stable_after_two_that_equal_the_one_before():
    watch = StableSelection(0.5, patience=2)
    orders = [[4, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4], [2, 1, 4, 3], [2, 1, 3, 4]]
    found = [watch.see([float(score) for score in scores]) for scores in orders]
    assert found == [False, False, False, False, True]  # order inside the selection is no change


def test_learning_stops_before_its_cap_when_the_selection_stays():
    found = score(planted(), "ila", mask_steps=100, until_stable=0.05)
    assert len(found.losses) == 20  # the planted module leads from the first step
    assert found.scores == score(planted(), "ila", mask_steps=20).scores


@pytest.mark.parametrize("method", ["elimination", "path"])
def test_a_method_is_repeated_on_other_batches_and_averaged(method):
    found = score(noisy(), method, mask_batches=1, mask_seed=4, until_stable=0.2)
    repeats = found.findings["num_repeats"]
    assert 3 <= repeats <= 10
    assert found.findings["is_settled"] == (repeats < 10) or repeats == 10
    single = [
        score(noisy(), method, mask_batches=1, mask_seed=4 + 1000 * index)
        for index in range(repeats)
    ]
    assert len({each.scores for each in single}) == repeats
    means = [fmean(scores) for scores in zip(*(each.scores for each in single), strict=True)]
    assert list(found.scores) == pytest.approx(means)
    assert found.losses == sum((each.losses for each in single), ())
    assert found.forward_equivalents == sum(each.forward_equivalents for each in single)


def test_repeats_stop_once_the_same_modules_lead():
    found = score(planted(), "elimination", mask_batches=2, until_stable=0.05)
    assert found.findings["num_repeats"] == 3  # the first, and two that agree with it
    assert found.findings["is_settled"]
    assert all(error >= 0 for error in found.standard_errors)


def test_parts_are_stable_when_the_best_of_them_stay():
    """The sums of their modules are the same in every run here."""
    draws = itertools.cycle([(4.0, 0.0), (0.0, 4.0), (0.0, 4.0), (4.0, 0.0)])

    def score(task, options):
        parts = (PartScores(next(draws), (1, 1)), PartScores((0.9, 0.9), (1, 1)))
        return ModuleScores(("a", "b"), (4.0, 1.8), unit="nats", parts=parts)

    task = Task(noisy(), [], 0, TrainerLog(noisy(), None))
    found = repeated(score, task, EliminationOptions(until_stable=0.25))
    # Means of the first part and the second: 4 0, 2 2, 1.3 2.7, 2 2, 2.4 1.6, 2 2
    assert found.findings == {"num_repeats": 6, "is_settled": True}
    assert found.parts[0].scores == (2.0, 2.0)
