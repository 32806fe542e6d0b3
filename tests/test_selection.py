# SPDX-License-Identifier: Apache-2.0
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylayers.errors import ConfigError, KeylayersError, RankingError
from keylayers.ranking.budget import Freeze, Time
from keylayers.ranking.certainty import decisions
from keylayers.ranking.selection import check_same_modules

from rankings import ranking_of

# budget, how many of 56 modules
COUNTS = [
    (0.3, 17), ("0.3", 17), (0.25, 14), (0.125, 7), (0.001, 1),
    (0.0625, 4),  # 3.5, a half goes up
    (1.0, 56), ("1.0", 56), ("1", 1), (17, 17), ("56", 56),
    (Freeze(0.25), 42),  # all but the worst quarter
]  # fmt: skip


@pytest.mark.parametrize(("budget", "count"), COUNTS)
def test_a_budget_buys_the_nearest_number_of_modules(budget, count):
    ranking = ranking_of([float(index) for index in range(56)])
    selection = ranking.select(budget)
    assert selection.modules == ranking.modules[-count:]
    assert selection.num_candidates == 56


def test_a_fraction_of_parameters_takes_the_best_while_they_fit():
    ranking = ranking_of([5.0, 4.0, 3.0, 2.0], num_parameters=[10, 50, 20, 20])
    for budget, sizes in (("0.6", [10, 50]), ("0.59", [10]), ("1", [10, 50, 20, 20])):
        taken = ranking.select(f"{budget}x-params")
        assert [one.num_parameters for one in taken.modules] == sizes
        assert taken.num_parameters == sum(sizes)


SHARES = ("0.0", "1.5", "nan", "inf", "0x-params", "2x-params", "1.5x-time", "-1x-time")
REFUSED = [
    *((text, rf"must be a fraction such as .* got '{text}'") for text in ("abc", "", "x-time")),
    *((one, rf"as a fraction must be above 0.* and at most 1.*, got {one}") for one in SHARES),
    ("0", r"as a count must be at least 1, got 0; a fraction needs a decimal point"),
    ("-1", r"as a count must be at least 1, got -1"),
    ("5", "between 1 and 4, the ranking's modules, got 5"),
    ("0.1x-params", "at least the best module, model.layers.1.b_proj with 10 parameters"),
    (3, "it takes 3 and only 2 have one"),
]


@pytest.mark.parametrize(("budget", "message"), REFUSED)
def test_a_budget_that_buys_nothing_or_more_than_has_a_score_is_refused(budget, message):
    with pytest.raises(KeylayersError, match=message):
        ranking_of([1.0, None, None, 2.0]).select(budget)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_freezing_nothing_or_everything_is_refused(fraction):
    with pytest.raises(ConfigError, match="`freeze` must be above 0 and below 1"):
        Freeze(fraction)


@given(
    st.lists(st.floats(-1, 1) | st.integers(0, 2).map(float), min_size=1, max_size=30),
    st.floats(0.01, 1),
)
def test_the_best_are_taken_and_a_tie_at_the_border_goes_by_model_order(scores, budget):
    ranking = ranking_of(scores)
    selection = ranking.select(budget)
    best = sorted(ranking.modules, key=lambda one: -one.score)  # keeps the order of equal ones
    count = len(selection.modules)
    assert selection.modules == tuple(one for one in ranking.modules if one in best[:count])
    worst = best[count - 1].score
    assert selection.num_tied_out == sum(one.score == worst for one in best[count:])


def test_a_ranking_of_another_model_is_refused_with_the_first_names():
    modules = ranking_of([1.0, 2.0, 3.0]).modules
    sizes = {one.name: one.num_parameters for one in modules}
    check_same_modules(modules, sizes)
    first = r"1 of 3 modules differ, first model.layers.0.b_proj \(10 .*, 11 in the model\)"
    for other, message in ((sizes | {modules[1].name: 11}, first), ({}, "none in the model")):
        with pytest.raises(RankingError, match=message):
            check_same_modules(modules, other)


# With the head, a forward pass of a full fine-tune is 120.
FULL = {"options": {"update": "full"}, "model": {"num_head_parameters": 20}}
SIZES = [40, 10, 30, 20]
OF_LORA = 3 * 2 * 2 * 10  # three passes through A and B, of rank 2 and width 10
# record, parameters, trained modules -> what a step costs and one of all, counted by hand
STEPS = [
    (FULL, SIZES, [0, 1, 2, 3], 120 + 120 + 100, 340),
    (FULL, SIZES, [0], 120 + 120 + 40, 340),  # backward through everything
    (FULL, SIZES, [3], 120 + 20 + 20 + 20, 340),  # backward through head and last, its gradient
    (FULL, SIZES, [1, 3], 120 + 20 + 60 + 30, 340),
    ({"options": {"lora_rank": 2}}, [100, 100], [1], 300 + OF_LORA, 400 + 2 * OF_LORA),
]


@pytest.mark.parametrize(("made_by", "sizes", "places", "cost", "whole"), STEPS)
def test_the_backward_pass_stops_at_the_lowest_trained_module(made_by, sizes, places, cost, whole):
    ranking = ranking_of([1.0] * len(sizes), num_parameters=sizes, provenance=made_by)
    names = [ranking.modules[place].name for place in places]
    assert ranking.step_time.share(names) == pytest.approx(cost / whole)


@pytest.mark.parametrize("budget", [0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("made_by", [FULL, {"options": {"lora_rank": 1}}])
def test_the_best_set_within_a_price_is_that_of_trying_all(budget, made_by):
    """Modules of equal sizes, so that taking them by score is exact."""
    scores = [0.5, 3.0, -1.0, 0.2, 2.0, 0.0, 1.0, None]
    ranking = ranking_of(scores, num_parameters=50, provenance=made_by)
    worth = {one.name: one.score or 0.0 for one in ranking.modules}
    best = max(
        sum(worth[name] for name in one)
        for count in range(9)
        for one in combinations(worth, count)
        if not one or ranking.step_time.share(one) <= budget + 1e-9
    )
    if best <= 0:
        with pytest.raises(ConfigError, match="the forward pass and one module"):
            ranking.select(Time(budget))
        return
    found = ranking.select(f"{budget}x-time")
    assert found == ranking.select(Time(budget))
    assert ranking.step_time.share(found.names) <= budget + 1e-9
    assert sum(worth[name] for name in found.names) == pytest.approx(best)
    assert all(one.score > 0 for one in found.modules)
    assert (found.budget, found.num_tied_out) == (f"{budget:g}x-time", 0)


def test_a_price_has_no_cut():
    noisy = ranking_of([3.0, 2.0, 1.0, 0.5], errors=9.0, provenance=FULL)
    assert set(decisions(noisy, 2).values()) == {False}
    assert noisy.select("0.7x-time").names != noisy.select(1).names
    assert set(decisions(noisy, "0.7x-time").values()) == {None}
