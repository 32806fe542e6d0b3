# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import keylayers
from keylayers.errors import RankingError
from keylayers.files import json_sha256
from keylayers.ranking.consensus import consensus
from keylayers.ranking.ranking import Ranking

from rankings import ranking_of, run_of, write_rankings


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
    runs = [run_of(), run_of(options={"seed": 1}, granularity="block")]
    merged = consensus(runs)
    hashes = [json_sha256(run.to_json()) for run in runs]
    own = {"method": "ila", "model": "m", "data": "a.jsonl"}
    assert merged.provenance["sources"] == [own | {"json_sha256": sha256} for sha256 in hashes]
    assert hashes[0] != hashes[1]
    assert merged.granularity == "module"
    assert consensus(runs[1:]).granularity == "block"


def test_consensus_takes_each_module_from_the_rankings_that_score_it():
    merged = consensus([ranking_of([2.0, None, None, 1.0]), ranking_of([None, 2.0, None, 1.0])])
    scores = [module.score for module in merged.modules]
    assert scores == [0.5, 0.5, None, 0.0]
    assert [module.standard_error for module in merged.modules] == [None, None, None, 0.0]


@settings(max_examples=20)  # each asks git for the commit
@given(st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12))
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


def test_compare_writes_the_consensus(tmp_path, capsys):
    files, target = write_rankings(tmp_path), tmp_path / "consensus.json"
    for _ in range(2):  # an earlier ranking is replaced
        assert keylayers("compare", files["seed-0"], files["data"], "--consensus", target) == 0
        assert f"consensus of 2 rankings: {target}" in capsys.readouterr().out
    assert Ranking.load(target).ranks() == Ranking.load(files["data"]).ranks()
    again = ("--json", "--consensus", tmp_path / "again.json")
    assert keylayers("compare", files["seed-0"], target, *again) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["pairs"]) == 1
    assert "consensus of 2 rankings" in captured.err


@pytest.mark.parametrize(
    ("second", "target", "message"),
    [
        ("data", "data.json", "must be a new file, but"),
        ("data", "notes.txt", "must be a new file or an earlier ranking"),
        ("deep", "new.json", "rankings must be of the same modules"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(tmp_path, capsys, second, target, message):
    files, target = write_rankings(tmp_path), tmp_path / target
    (tmp_path / "notes.txt").write_text("mine")
    before = target.read_bytes() if target.exists() else None
    assert keylayers("compare", files["seed-0"], files[second], "--consensus", target) == 2
    assert message in capsys.readouterr().err
    assert (target.read_bytes() if target.exists() else None) == before
