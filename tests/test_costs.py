# SPDX-License-Identifier: Apache-2.0
"""Budgets by the cost of a training step: counted by hand, and the best set by trying all."""

from itertools import combinations

import pytest

from keylayers.errors import ConfigError
from keylayers.ranking.budget import Time
from keylayers.ranking.certainty import decisions

from rankings import ranking_of

FULL = {"options": {"update": "full"}, "model": {"num_head_parameters": 20}}
SIZES = [40, 10, 30, 20]  # with the head, a forward pass is 120


def names_of(ranking, places):
    return {ranking.modules[place].name for place in places}


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
    assert ranking.step_time.share(names_of(ranking, places)) == pytest.approx(cost / 340)


def test_lora_costs_its_own_matrices():
    made_by = {"options": {"lora_rank": 2}}
    ranking = ranking_of([2.0, 1.0], num_parameters=[100, 100], provenance=made_by)
    own = 3 * 2 * 2 * 10  # three passes through A and B of width 10
    expected = (200 + 100 + own) / (200 + 200 + 2 * own)
    assert ranking.step_time.share(names_of(ranking, [1])) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("made_by", [FULL, {"options": {"lora_rank": 1}}])
def test_the_best_set_within_a_price_is_that_of_trying_all(budget, made_by):
    """Of equal sizes, so that taking by score is exact."""
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


@pytest.mark.parametrize("written", ["0x-time", "1.5x-time", "x-time", "allx-time", "-1x-time"])
def test_prices_without_sense_are_refused(written):
    with pytest.raises(ConfigError, match=r"`budget`"):
        ranking_of([2.0, 1.0]).select(written)


def test_a_price_has_no_cut():
    from dataclasses import replace

    ranking = ranking_of([3.0, 2.0, 1.0, 0.5], provenance=FULL)
    modules = tuple(replace(one, standard_error=9.0) for one in ranking.modules)
    noisy = replace(ranking, modules=modules)
    assert set(decisions(noisy, 2).values()) == {False}
    assert noisy.select("0.7x-time").names != noisy.select(1).names
    assert set(decisions(noisy, "0.7x-time").values()) == {None}
