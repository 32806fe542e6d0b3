# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keylayers.errors import RankingError
from keylayers.ranking.compare import agreement
from keylayers.ranking.matching import match, scores_of

from rankings import grid_of

# two models of different shape, a budget at which they agree fully, modules compared and scored
THE_SAME = {
    "another depth": (
        {"q": [8.0, 6.0, 4.0, 2.0], "v": [7.0, 5.0, 3.0, 1.0]},
        {"q": [80.0 - 10 * b for b in range(8)], "v": [75.0 - 10 * b for b in range(8)]},
        *(0.5, 8, 8),
    ),
    "no score": ({"q": [3.0, None, 1.0]}, {"q": [5.0, 4.0, 3.0, 2.0, 1.0]}, 1, 3, 2),
    "one block": ({"q": [2.0], "v": [1.0]}, {"q": [4.0, 1.0], "v": [3.0, 2.0]}, 0.5, 2, 2),
}


@pytest.mark.parametrize("name", THE_SAME)
def test_the_same_profile_in_another_shape_agrees_fully(name):
    *columns, budget, num_modules, num_scored = THE_SAME[name]
    shallow, deep = (grid_of(own, errors=0.0) for own in columns)
    for pair in (*agreement([shallow, deep], budget), *agreement([deep, shallow], budget)):
        assert (pair.is_by_depth, pair.left_out) == (True, ())
        assert (pair.num_modules, pair.num_scored) == (num_modules, num_scored)
        assert (pair.jaccard, pair.tau, pair.top_weighted_tau) == pytest.approx((1, 1, 1))
        assert (*pair.jaccard_interval, *pair.tau_interval) == pytest.approx((1, 1, 1, 1))


def test_ranks_between_blocks_are_interpolated_by_hand():
    # depths 0, 1/2, 1 in the shallow model and 0, 1/3, 2/3, 1 in the deep one
    shallow = grid_of({"q": [1.0, 3.0, 2.0]})
    deep = grid_of({"q": [10.0, -500.0, 30.0, 20.0]})
    of_shallow, of_deep = match(shallow, deep).to_standings
    assert of_shallow(scores_of(shallow)) == pytest.approx([-1, -1 / 3, -2 / 3])
    # ranks 3, 4, 1, 2 of 4; halfway between blocks 1 and 2 lies (4 + 1) / 2
    assert of_deep(scores_of(deep)) == pytest.approx([-3 / 4, -2.5 / 4, -2 / 4])
    assert agreement([shallow, deep], 1)[0].tau == pytest.approx(1 / 3)


def test_blocks_without_the_projection_or_a_score_are_bridged():
    shallow = grid_of({"q": [2.0, 1.0]})
    deep = grid_of({"q": ["absent", 5.0, None, 7.0, "absent"], "v": [0.0] * 5})
    matched = match(shallow, deep)
    # ranks 2 and 1 of 2, held constant to the first and the last block
    assert matched.to_standings[1](scores_of(deep)) == pytest.approx([-1, -1 / 2])
    assert matched.left_out == ("v",)


def test_models_without_a_common_projection_are_refused():
    message = r"must share a projection .* one has q, v and the other up"
    with pytest.raises(RankingError, match=message):
        match(grid_of({"q": [1.0], "v": [2.0]}), grid_of({"up": [1.0, 2.0]}))


SCRIPT = """
from rankings import grid_of
from keylayers.ranking.compare import agreement
from keylayers.ranking.consensus import consensus
a = grid_of({"q": [3.0, 2.0, 2.0], "v": [1.0, 1.0, 0.0], "x": [1.0] * 3}, errors=1.0)
b = grid_of({"v": [3.0, 2.0, 2.0, 1.0], "q": [1.0] * 4, "y": [1.0] * 4}, errors=1.0)
print(agreement([a, b, a], 0.5), consensus([a, a]).modules, b.ordered(), b.select(3).names)
"""


def test_results_do_not_depend_on_the_hash_seed():
    tests = Path(__file__).parent
    path = {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    outputs = {
        subprocess.check_output(
            [sys.executable, "-c", SCRIPT], env={**os.environ, **path, "PYTHONHASHSEED": seed}
        )
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
