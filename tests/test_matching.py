# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keylayers.errors import RankingError
from keylayers.ranking.matching import match, scores_of
from test_compare import deep_ranking, pair_of, with_errors


def test_the_same_profile_at_another_depth_agrees_fully():
    shallow = deep_ranking({"q": [8.0, 6.0, 4.0, 2.0], "v": [7.0, 5.0, 3.0, 1.0]})
    deep = deep_ranking(
        {"q": [80 - 10.0 * block for block in range(8)], "v": [75 - 10.0 * b for b in range(8)]}
    )
    for first, second in ((shallow, deep), (deep, shallow)):
        pair = pair_of(first, second)
        assert (pair.is_by_depth, pair.num_modules, pair.num_scored) == (True, 8, 8)
        assert pair.jaccard == 1.0
        assert pair.tau == pytest.approx(1)
        assert pair.top_weighted_tau == pytest.approx(1)
        assert pair.left_out == ()


def test_ranks_between_blocks_are_interpolated_by_hand():
    # depths 0, 1/2, 1 in the shallow model and 0, 1/3, 2/3, 1 in the deep one
    shallow = deep_ranking({"q": [1.0, 3.0, 2.0]})
    deep = deep_ranking({"q": [10.0, -500.0, 30.0, 20.0]})
    matched = match(shallow, deep)
    assert matched.standings_of_first(scores_of(shallow)) == pytest.approx([-1, -1 / 3, -2 / 3])
    # ranks 3, 4, 1, 2 of 4; halfway between blocks 1 and 2 lies (4 + 1) / 2
    at_depths = matched.standings_of_second(scores_of(deep))
    assert at_depths == pytest.approx([-3 / 4, -2.5 / 4, -2 / 4])
    assert pair_of(shallow, deep).tau == pytest.approx(1 / 3)


def test_blocks_without_the_projection_or_a_score_are_bridged():
    shallow = deep_ranking({"q": [2.0, 1.0]})
    deep = deep_ranking({"q": ["absent", 5.0, None, 7.0, "absent"], "v": [0.0] * 5})
    matched = match(shallow, deep)
    # ranks 2 and 1 of 2, held constant to the first and the last block
    assert matched.standings_of_second(scores_of(deep)) == pytest.approx([-1, -1 / 2])
    assert matched.left_out == ("v",)


def test_an_unscored_module_of_the_shallow_model_stays_unscored():
    shallow = deep_ranking({"q": [3.0, None, 1.0]})
    deep = deep_ranking({"q": [5.0, 4.0, 3.0, 2.0, 1.0]})
    pair = pair_of(shallow, deep, 1)
    assert (pair.num_modules, pair.num_scored) == (3, 2)
    assert pair.tau == pytest.approx(1)


def test_a_model_of_one_block_is_at_depth_zero():
    one = deep_ranking({"q": [2.0], "v": [1.0]})
    deep = deep_ranking({"q": [4.0, 1.0], "v": [3.0, 2.0]})
    assert pair_of(one, deep).tau == pytest.approx(1)


def test_models_of_different_shape_have_intervals_too():
    shallow = with_errors(deep_ranking({"q": [3.0, 2.0, 1.0]}), 0.0)
    deep = with_errors(deep_ranking({"q": [5.0, 4.0, 3.0, 2.0, 1.0]}), 0.0)
    pair = pair_of(shallow, deep)
    assert pair.tau_interval == pytest.approx((1, 1))
    assert pair.jaccard_interval == pytest.approx((1, 1))


def test_models_without_a_common_projection_are_refused():
    with pytest.raises(
        RankingError, match=r"must share a projection .* one has q, v and the other up"
    ):
        pair_of(deep_ranking({"q": [1.0], "v": [2.0]}), deep_ranking({"up": [1.0, 2.0]}))


def test_results_do_not_depend_on_the_hash_seed():
    script = """
import sys
sys.path[:0] = [{source!r}, {tests!r}]
from test_compare import deep_ranking, with_errors
from keylayers.ranking.compare import agreement
from keylayers.ranking.consensus import consensus
a = with_errors(deep_ranking({{"q": [3.0, 2.0, 2.0], "v": [1.0, 1.0, 0.0], "x": [1.0] * 3}}), 1.0)
b = with_errors(deep_ranking({{"v": [3.0, 2.0, 2.0, 1.0], "q": [1.0] * 4, "y": [1.0] * 4}}), 1.0)
print(agreement([a, b, a], 0.5), consensus([a, a]).modules, b.ordered(), b.select(3).names)
"""
    tests = Path(__file__).parent
    script = script.format(source=str(tests.parent / "src"), tests=str(tests))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(outputs) == 1
