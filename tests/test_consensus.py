# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given

from keylayers.errors import RankingError
from keylayers.files import json_sha256
from keylayers.ranking.consensus import consensus
from keylayers.ranking.ranking import Ranking
from test_compare import SCORES, compare, deep_ranking, run_of, with_errors

from rankings import ranking_of


def test_consensus_by_hand():
    first, second = ranking_of([9.0, 5.0, 5.0, 1.0]), ranking_of([3.0, 4.0, 2.0, 1.0])
    merged = consensus([first, second])
    # relative ranks: 1, 2.5, 2.5, 4 and 2, 1, 3, 4, each of 4
    means = [1.5 / 4, 1.75 / 4, 2.75 / 4, 4 / 4]
    assert [module.score for module in merged.modules] == pytest.approx([1 - m for m in means])
    # of two values: half their distance
    errors = [0.5 / 4, 0.75 / 4, 0.25 / 4, 0]
    assert [module.standard_error for module in merged.modules] == pytest.approx(errors)
    assert [module.name for module in merged.ordered()] == [m.name for m in first.modules]
    assert (merged.method, merged.granularity) == ("consensus", "module")


def test_consensus_lists_its_sources():
    runs = [run_of(), run_of(seed=1, granularity="block")]
    merged = consensus(runs)
    assert merged.provenance["sources"] == [
        {
            "method": "ila",
            "model": "m",
            "data": "a.jsonl",
            "json_sha256": json_sha256(run.to_json()),
        }
        for run in runs
    ]
    assert merged.provenance["sources"][0] != merged.provenance["sources"][1]
    assert merged.granularity == "module"
    assert consensus([run_of(granularity="block")]).granularity == "block"


def test_consensus_takes_each_module_from_the_rankings_that_score_it():
    merged = consensus([ranking_of([2.0, None, None, 1.0]), ranking_of([None, 2.0, None, 1.0])])
    scores = [module.score for module in merged.modules]
    assert scores == [0.5, 0.5, None, 0.0]
    assert [module.standard_error for module in merged.modules] == [None, None, None, 0.0]


@given(SCORES)
def test_the_consensus_of_one_ranking_has_its_order(scores):
    ranking = ranking_of(scores)
    merged = consensus([ranking])
    assert merged.ranks() == ranking.ranks()
    assert all(module.standard_error is None for module in merged.modules)


def test_rankings_of_different_modules_have_no_consensus():
    with pytest.raises(RankingError, match=r"ranking 2 and the first differ in 1, first model"):
        consensus([ranking_of([1.0, 2.0]), ranking_of([1.0])])
    with pytest.raises(RankingError, match=r"at least one ranking, got none"):
        consensus([])


@pytest.fixture
def files(tmp_path):
    """A run, one on other data, and one of a model of another shape."""
    made = {
        "run": with_errors(run_of(), 0.5),
        "data": run_of(content="b"),
        "deep": deep_ranking({"a_proj": [3.0, 2.0, 1.0], "c_proj": [1.0, 2.0, None]}),
    }
    paths = {name: tmp_path / f"{name}.json" for name in made}
    for name, ranking in made.items():
        ranking.save(paths[name])
    return paths


def test_compare_writes_the_consensus(files, tmp_path, capsys):
    target = tmp_path / "consensus.json"
    assert compare(files["run"], files["data"], "--consensus", target) == 0
    assert f"consensus of 2 rankings: {target}" in capsys.readouterr().out
    merged = Ranking.load(target)
    assert merged.ranks() == Ranking.load(files["data"]).ranks()
    assert compare(files["run"], target, "--json", "--consensus", tmp_path / "again.json") == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["pairs"]) == 1
    assert "consensus of 2 rankings" in captured.err


def test_mistakes_are_told_in_a_line_and_nothing_is_written(files, tmp_path, capsys):
    before = files["data"].read_bytes()
    assert compare(files["run"], files["data"], "--consensus", files["data"]) == 2
    assert "must be a new file" in capsys.readouterr().err
    assert files["data"].read_bytes() == before
    target = tmp_path / "consensus.json"
    assert compare(files["run"], files["deep"], "--consensus", target) == 2
    assert "rankings must be of the same modules" in capsys.readouterr().err
    assert not target.exists()
