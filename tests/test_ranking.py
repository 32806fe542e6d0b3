# SPDX-License-Identifier: Apache-2.0
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import keylayers
from keylayers.errors import RankingError
from keylayers.ranking.ranking import Ranking

from rankings import ranking_of


@given(st.lists(st.none() | st.floats(-5, 5), min_size=1, max_size=20))
def test_equal_scores_share_the_better_rank_in_model_order(tmp_path_factory, scores):
    ranking = ranking_of(scores, provenance={"seed": 3, "ünïcode": "✓"})
    known = [score for score in scores if score is not None]
    ranks = [
        None if score is None else 1 + sum(other > score for other in known) for score in scores
    ]
    assert list(ranking.ranks().values()) == ranks
    places = sorted(range(len(ranks)), key=lambda place: (ranks[place] or len(ranks) + 1, place))
    assert ranking.ordered() == [ranking.modules[place] for place in places]
    path = tmp_path_factory.mktemp("ranking") / "ranking.json"
    ranking.save(path)
    assert Ranking.load(path) == Ranking.load(path.parent) == ranking


ONE, TWO = ranking_of([1.0]), ranking_of([1.0, 2.0])
NUMBER = r"finite number or None, got .* for model.layers.0.b_proj"
IMPOSSIBLE = [
    (lambda: ranking_of([1.0, math.nan]), NUMBER),
    (lambda: ranking_of([1.0, -math.inf]), NUMBER),
    (lambda: ranking_of([1.0, 1.0], errors=[1.0, math.inf]), NUMBER),
    (lambda: Ranking(ONE.modules * 2, "x"), "each module once, but repeats model.layers.0.a_proj"),
    (lambda: Ranking((), "x"), "at least one module"),
]


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE)
def test_a_ranking_that_cannot_be_is_refused(make, message):
    with pytest.raises(RankingError, match=message):
        make()


WHOLE = TWO.to_json()


def row(**values):
    return {"modules": [WHOLE["modules"][0] | values]}


FINITE = r"`modules\[0\].score` must be a finite number, got "
# other values at the top of the file, or all of its text; what is said
DAMAGE = [
    (json.dumps(WHOLE)[:200], "must be whole JSON, but it is damaged or cut off"),
    ("", "damaged or cut off"),
    ("[" * 100_000, "damaged or cut off"),
    ("[1, 2]", "must be a ranking file"),
    (None, "must exist, but there is no '.*r.json'"),
    ({"schema": "other"}, "must be a ranking file"),
    ({"schema_version": 9}, "`schema_version` must be 1, got 9"),
    ({"modules": 3}, "`modules` must be a list, got 3"),
    ({"modules": [3]}, r"`modules\[0\]` must be a mapping, got 3"),
    ({"modules": []}, "must hold at least one module"),
    ({"method": None}, "`method` must be text, got None"),
    ({"method": "a" * 2000}, "`method` must be shorter, got 'aaa"),
    (row(block_index=0.5), r"`modules\[0\].block_index` must be a whole number, got 0.5"),
    (row(num_parameters=0), "num_parameters` must be greater than or equal to 1, got 0"),
    (row(score="high"), FINITE + "'high'"),
    (row(score=math.nan), FINITE + "nan"),
    (row(score=True), FINITE + "True"),
    (row(score=10**400), FINITE + "1000"),
    (row(standard_error=math.inf), "standard_error` must be a finite number, got inf"),
    (row(standard_error=-1), "standard_error` must be greater than or equal to 0, got -1"),
    ({"provenance": 3}, "`provenance` must be a mapping, got 3"),
    ({"provenance": {"unknown": [math.nan]}}, "`provenance` must be JSON with finite numbers"),
    ({"provenance": {"options": 5}}, "`provenance.options` must be a mapping, got 5"),
    ({"provenance": {"mask": {"losses": 3}}}, "`provenance.mask.losses` must be a list, got 3"),
    ({"provenance": {"mask": {}}}, "`provenance.mask.losses` must be there, got nothing"),
    ({"provenance": {"held_out_loss_nats": {"base": "x"}}}, "base` must be a finite number, got"),
    ({"provenance": {"options": {"lora_rank": 0}}}, "lora_rank` must be greater than or equal to"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_files_are_refused_with_one_line(tmp_path, damage, message):
    path = tmp_path / "r.json"
    if damage is not None:
        path.write_text(damage if isinstance(damage, str) else json.dumps(WHOLE | damage))
    with pytest.raises(RankingError, match=message) as caught:
        Ranking.load(path)
    assert "\n" not in str(caught.value)


OPEN = (
    "at budget {} of 6 modules), {} not decided by the data (marked ~): {} 95 % interval contains"
)
ONE_WIDE = [0.1, 0.9, 0.1, 0.1, 0.1, None]
# standard errors, budget -> marked ranks, the line under the table
SHOWN = [
    ([0.1, 0.1, 0.3, 0.1, 0.1, 0.1], "0.5", "3", OPEN.format("0.5 (3", "1 module is", "its")),
    (ONE_WIDE, "0.3", "2", OPEN.format("0.3 (2", "1 module is", "its")),
    (ONE_WIDE, "0.3", "2", "contains the cut; 1 without an interval"),
    ([9.0] * 6, "0.4x-params", "123456", OPEN.format("0.4x-params (2", "6 modules are", "their")),
    ([9.0] * 6, "6", "", "at budget 6 (6 of 6 modules), every module's place is decided"),
    (None, "0.3", "", "no intervals: the method gives none"),
]


@pytest.fixture
def show(tmp_path, capsys):
    """Runs `keylayers show` on a ranking: what it prints on either stream."""

    def run(scores, errors, *words, code=0):
        ranking_of(scores, errors=errors).save(tmp_path / "ranking.json")
        assert keylayers("show", tmp_path, *words) == code
        return capsys.readouterr()

    return run


SIX = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(("errors", "budget", "marked", "line"), SHOWN)
def test_show_marks_what_the_data_do_not_decide(show, errors, budget, marked, line):
    out = show(SIX, errors, "--budget", budget).out
    assert "".join(re.findall("^~ *([0-9])", out, re.MULTILINE)) == marked
    assert line in " ".join(out.split())


def test_show_writes_what_is_decided_as_json(show, tmp_path):
    text = show([1.0, 2.0, 4.0, 3.0], [0.1, None, 0.1, 0.9], "--json", "--budget", "0.5").out
    content = json.loads(text)
    assert content["budget"] == "0.5"
    assert [module["decided"] for module in content["modules"]] == [True, False, None, True]
    (tmp_path / "shown.json").write_text(text)
    shown, own = Ranking.load(tmp_path / "shown.json"), Ranking.load(tmp_path)
    assert shown.ranks() == {module.name: own.ranks()[module.name] for module in shown.modules}


def test_show_shows_a_ranking_whose_budget_reaches_modules_without_a_score(show):
    unscored = [1.0, *[None] * 5], [0.1, *[None] * 5]
    out = " ".join(show(*unscored).out.split())
    assert "nothing is marked at budget 0.3: the budget must stay within" in out
    content = json.loads(show(*unscored, "--json").out)
    assert [module["decided"] for module in content["modules"]] == [None] * 6


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_show_refuses_a_budget_that_cannot_be(show, form):
    messages = {"auto": "auto is for `keylayers train`", "7": "between 1 and 6", "x": "must be a f"}
    for budget, message in messages.items():
        captured = show(SIX, None, "--budget", budget, *form, code=2)
        assert (message in captured.err, captured.out) == (True, "")
