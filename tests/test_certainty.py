# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylayers.ranking.certainty import decisions, undecided
from keylayers.report.terminal import certainty_line

from rankings import ranking_of

MODULES = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=12)
# score and standard error of each module, budget -> places of the undecided, in model order
CASES = {
    "the cut is at 2.5": ([(4, 0.7), (3, 0.3), (2, 0.2), (1, 0.8)], 2, [1, 3]),
    "one reaches far down": ([(4, 0.8), (3, 0.1), (2, 0.1), (1, 0.1)], 2, [0]),
    "the interval ends at the cut": ([(1.96, 1.0), (-1.96, 1.0)], 1, [0, 1]),
    "the interval ends before it": ([(1.96, 0.99), (-1.96, 0.99)], 1, []),
    "a tie at the cut": ([(2, 0.0), (1, 0.0), (1, 0.0), (0, 0.0)], 2, [1, 2]),
    "a tie away from the cut": ([(2, 0.0), (2, 0.0), (0, 0.0), (0, 0.0)], 2, []),
    "no errors": ([(2, None), (1, None), (1, None)], 1, []),
    "an error of some": ([(2, None), (1, 9.0), (1, None)], 1, [1]),
    "no score": ([(2, 9.0), (1, 0.1), (None, 9.0)], 1, [0]),
    "all that is left out has no score": ([(2, 9.0), (1, 9.0), (None, None)], 2, []),
    "all modules": ([(2, 9.0), (2, 9.0), (1, 9.0)], 1.0, []),
    "one module": ([(2, 9.0)], 0.3, []),
    "a fraction, not in order": ([(0, 0.1), (3, 0.1), (1, 0.6), (2, 0.1)], 0.5, [2]),
    "of parameters": ([(0, 9.0), (3, 0.1), (1, 0.1), (2, 0.1)], "0.5x-params", [0]),
}


def noisy(pairs):
    """A ranking from a score and a standard error for each module."""
    scores, errors = (
        [None if value is None else float(value) for value in column]
        for column in zip(*pairs, strict=True)
    )
    return ranking_of(scores, errors=errors)


@pytest.mark.parametrize("name", CASES)
def test_undecided_by_hand(name):
    pairs, budget, expected = CASES[name]
    ranking = noisy(pairs)
    assert undecided(ranking, budget) == tuple(ranking.modules[i].name for i in expected)


def test_a_decision_is_unknown_without_an_interval():
    ranking = noisy([(3, 0.1), (2, None), (1, 9.0), (None, 0.1)])
    assert list(decisions(ranking, 1).values()) == [True, None, False, None]
    assert list(decisions(ranking, 1)) == [module.name for module in ranking.modules]
    assert list(decisions(ranking, 3).values()) == [True, None, True, None]


@given(MODULES, st.integers(-30, 30), st.data())
def test_the_unit_of_the_scores_changes_nothing_and_noise_decides_no_place(pairs, power, data):
    budget, factor = data.draw(st.integers(1, len(pairs))), 2.0**power
    found = undecided(noisy(pairs), budget)
    # Powers of two scale floating-point numbers exactly: ends of intervals stay on the cut.
    scaled = [(factor * score, factor * error) for score, error in pairs]
    assert undecided(noisy(scaled), budget) == found
    louder = [(score, error + 1) for score, error in pairs]
    assert set(found) <= set(undecided(noisy(louder), budget))


@given(MODULES, st.data())
def test_without_noise_all_but_ties_is_decided(pairs, data):
    ranking = noisy([(score, 0) for score, _ in pairs])
    chosen = ranking.select(data.draw(st.integers(1, len(pairs)))).modules
    inside = {module.score for module in chosen}
    outside = {module.score for module in ranking.modules if module not in chosen}
    tied = tuple(module.name for module in ranking.modules if module.score in inside & outside)
    assert undecided(ranking, len(chosen)) == tied


def test_equal_scores_are_said_to_rank_nothing():
    assert "nothing is ranked" in certainty_line(ranking_of([0.5] * 4), 2)
    assert "nothing is ranked" not in certainty_line(ranking_of([0.5, 0.5, 0.4]), 2)
    assert not ranking_of([1.0]).is_flat
