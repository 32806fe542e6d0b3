# SPDX-License-Identifier: Apache-2.0
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankings import ranking_of


def test_chance_is_what_random_selections_give():
    from keylayers.compare import chance_jaccard

    draw = random.Random(0)
    modules = range(12)
    total = 0.0
    for _ in range(20_000):
        first, second = set(draw.sample(modules, 5)), set(draw.sample(modules, 4))
        total += len(first & second) / len(first | second)
    assert chance_jaccard(12, 5, 4) == pytest.approx(total / 20_000, abs=0.005)


def test_two_random_three_quarters_share_about_sixty_per_cent():
    from keylayers.compare import chance_jaccard

    assert chance_jaccard(224, 168, 168) == pytest.approx(0.60, abs=0.005)


def test_agreement_by_hand():
    from keylayers.compare import agreement

    first = ranking_of([4.0, 3.0, 2.0, 1.0])
    same = ranking_of([40.0, 30.0, 20.0, 10.0])
    opposite = ranking_of([1.0, 2.0, 3.0, 4.0])
    pairs = agreement([first, same, opposite], 0.5)
    assert [(pair.first, pair.second, pair.jaccard) for pair in pairs] == [
        (0, 1, 1.0),
        (0, 2, 0.0),
        (1, 2, 0.0),
    ]
    # two of four at random: overlap 0, 1, 2 with weights 1, 4, 1 of 6
    chance = (4 * (1 / 3) + 1) / 6
    assert pairs[0].chance_jaccard == pytest.approx(chance)
    assert pairs[0].corrected == 1.0
    assert pairs[1].corrected == pytest.approx(-chance / (1 - chance))


def test_at_all_modules_agreement_says_nothing():
    from keylayers.compare import agreement

    (pair,) = agreement([ranking_of([1.0, 2.0]), ranking_of([2.0, 1.0])], 1.0)
    assert (pair.jaccard, pair.chance_jaccard, pair.corrected) == (1.0, 1.0, None)


def test_rankings_of_different_modules_are_refused():
    from keylayers.compare import agreement
    from keylayers.errors import RankingError

    with pytest.raises(RankingError, match=r"ranking 2 and the first differ in 1, first model"):
        agreement([ranking_of([1.0, 2.0]), ranking_of([1.0])], 1)


@given(st.integers(1, 30), st.data())
def test_chance_lies_between_none_and_all(num_modules, data):
    from keylayers.compare import chance_jaccard

    size = data.draw(st.integers(1, num_modules))
    other = data.draw(st.integers(1, num_modules))
    chance = chance_jaccard(num_modules, size, other)
    assert 0 <= chance <= min(size, other) / max(size, other) + 1e-12
    assert chance == pytest.approx(chance_jaccard(num_modules, other, size))
