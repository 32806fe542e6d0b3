# SPDX-License-Identifier: Apache-2.0
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.budget import Freeze, Time, parse_budget
from keylayers.ranking.certainty import decisions
from keylayers.ranking.selection import check_same_modules

from rankings import ranking_of

# budget, how many of 56 modules
COUNTS = [
    (0.3, 17),  # 16.8
    ("0.3", 17),
    (0.25, 14),
    (0.125, 7),
    (0.0625, 4),  # 3.5, a half goes up
    (1.0, 56),
    ("1.0", 56),
    ("1", 1),
    (17, 17),
    ("56", 56),
    (0.001, 1),
    (Freeze(0.25), 42),  # all but the worst quarter
]


@pytest.mark.parametrize(("budget", "count"), COUNTS)
def test_a_budget_buys_the_nearest_number_of_modules(budget, count):
    selection = ranking_of([float(index) for index in range(56)]).select(budget)
    assert len(selection.modules) == count
    best = [f"model.layers.{i // 2}.{'ab'[i % 2]}_proj" for i in range(56 - count, 56)]
    assert list(selection.names) == best
    assert selection.num_candidates == 56


def test_a_fraction_of_parameters_takes_the_best_while_they_fit():
    ranking = ranking_of([5.0, 4.0, 3.0, 2.0], num_parameters=[10, 50, 20, 20])
    assert len(ranking.select("0.6x-params").modules) == 2  # 60 of 100
    assert len(ranking.select("0.59x-params").modules) == 1
    assert ranking.select("1x-params").num_parameters == 100


SHARES = [0.0, "1.5", "nan", "inf", "0x-params", "2x-params", "1.5x-time", "-1x-time"]
REFUSED = [
    *((text, rf"must be a fraction such as .* got '{text}'") for text in ("abc", "", "x-time")),
    *(
        (share, rf"as a fraction must be above 0.* and at most 1.*, got {share}")
        for share in SHARES
    ),
    ("0", r"as a count must be at least 1, got 0; a fraction needs a decimal point"),
    ("-1", r"as a count must be at least 1, got -1"),
]


@pytest.mark.parametrize(("budget", "message"), REFUSED)
def test_a_budget_that_cannot_be_is_refused_before_there_is_a_ranking(budget, message):
    with pytest.raises(ConfigError, match=message):
        parse_budget(budget)


def test_a_budget_that_buys_nothing_or_more_than_there_is_is_refused():
    ranking = ranking_of([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ConfigError, match="between 1 and 4, the ranking's modules, got 5"):
        ranking.select("5")
    message = "must allow at least the best module, model.layers.1.b_proj with 10 parameters"
    with pytest.raises(ConfigError, match=message):
        ranking.select("0.1x-params")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_freezing_nothing_or_everything_is_refused(fraction):
    with pytest.raises(ConfigError, match="`freeze` must be above 0 and below 1"):
        Freeze(fraction)


def test_modules_without_a_score_cannot_be_bought():
    ranking = ranking_of([1.0, None, None, 2.0])
    assert len(ranking.select(2).modules) == 2
    with pytest.raises(RankingError, match="it takes 3 and only 2 have one"):
        ranking.select(3)


def test_a_tie_at_the_border_goes_by_model_order_and_is_counted():
    selection = ranking_of([1.0, 2.0, 1.0, 1.0]).select(2)
    assert selection.names == ("model.layers.0.a_proj", "model.layers.0.b_proj")
    assert selection.num_tied_out == 2


@given(
    st.lists(st.floats(-1, 1) | st.integers(0, 2).map(float), min_size=1, max_size=30),
    st.floats(0.01, 1),
)
def test_nothing_left_out_is_better_than_what_is_taken(scores, budget):
    selection = ranking_of(scores).select(budget)
    taken = [module.score for module in selection.modules]
    names = set(selection.names)
    left = [module.score for module in ranking_of(scores).modules if module.name not in names]
    assert len(taken) + len(left) == len(scores)
    assert not left or min(taken) >= max(left)
    assert selection.num_tied_out == sum(score == min(taken) for score in left)


def test_a_ranking_of_another_model_is_refused_with_the_first_names():
    ranking = ranking_of([1.0, 2.0, 3.0])
    here = {"model.layers.0.a_proj": 10, "model.layers.0.b_proj": 11, "model.layers.1.a_proj": 10}
    check_same_modules(ranking.modules, here | {"model.layers.0.b_proj": 10})
    message = r"1 of 3 modules differ, first model.layers.0.b_proj \(10 .*, 11 in the model\)"
    with pytest.raises(RankingError, match=message):
        check_same_modules(ranking.modules, here)
    with pytest.raises(RankingError, match="none in the model"):
        check_same_modules(ranking.modules, {})


# What a training step costs, counted by hand.
FULL = {"options": {"update": "full"}, "model": {"num_head_parameters": 20}}
SIZES = [40, 10, 30, 20]  # with the head, a forward pass is 120


@pytest.mark.parametrize(
    ("places", "cost"),
    [
        ([0, 1, 2, 3], 120 + 120 + 100),
        ([0], 120 + 120 + 40),  # backward through everything
        ([3], 120 + 20 + 20 + 20),  # forward, backward through head and the last, its gradient
        ([1, 3], 120 + 20 + 60 + 30),
    ],
)
def test_the_backward_pass_stops_at_the_lowest_trained_module(places, cost):
    ranking = ranking_of([4.0, 3.0, 2.0, 1.0], num_parameters=SIZES, provenance=FULL)
    names = [ranking.modules[place].name for place in places]
    assert ranking.step_time.share(names) == pytest.approx(cost / 340)


def test_lora_costs_its_own_matrices():
    made_by = {"options": {"lora_rank": 2}}
    ranking = ranking_of([2.0, 1.0], num_parameters=[100, 100], provenance=made_by)
    own = 3 * 2 * 2 * 10  # three passes through A and B of width 10
    expected = (200 + 100 + own) / (200 + 200 + 2 * own)
    assert ranking.step_time.share([ranking.modules[1].name]) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("made_by", [FULL, {"options": {"lora_rank": 1}}])
def test_the_best_set_within_a_price_is_that_of_trying_all(budget, made_by):
    """Modules of equal sizes, so that taking them by score is exact."""
    scores = [0.5, 3.0, -1.0, 0.2, 2.0, 0.0, 1.0, None]
    ranking = ranking_of(scores, num_parameters=50, provenance=made_by)
    worth = {one.name: one.score or 0.0 for one in ranking.modules}
    sets = [
        set(one)
        for count in range(1, 9)
        for one in combinations(worth, count)
        if ranking.step_time.share(one) <= budget + 1e-9
    ]
    best = max((sum(worth[name] for name in one) for one in sets), default=0.0)
    if best <= 0:
        with pytest.raises(ConfigError, match="the forward pass and one module"):
            ranking.select(Time(budget))
        return
    found = ranking.select(Time(budget)).modules
    assert ranking.step_time.share({one.name for one in found}) <= budget + 1e-9
    assert sum(worth[one.name] for one in found) == pytest.approx(best)
    assert all(one.score > 0 for one in found)
    selected = ranking.select(f"{budget}x-time")
    assert selected.modules == found
    assert (selected.budget, selected.num_tied_out) == (f"{budget:g}x-time", 0)


def test_a_price_has_no_cut():
    noisy = ranking_of([3.0, 2.0, 1.0, 0.5], errors=9.0, provenance=FULL)
    assert set(decisions(noisy, 2).values()) == {False}
    assert noisy.select("0.7x-time").names != noisy.select(1).names
    assert set(decisions(noisy, "0.7x-time").values()) == {None}
