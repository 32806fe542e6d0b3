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


def test_higher_scores_come_first_and_ties_share_the_better_rank_in_model_order():
    ranking = ranking_of([1.0, 3.0, 2.0, 3.0, None, -1.0])
    names = [module.name.removeprefix("model.layers.") for module in ranking.ordered()]
    assert names == ["0.b_proj", "1.b_proj", "1.a_proj", "0.a_proj", "2.b_proj", "2.a_proj"]
    assert list(ranking.ranks().values()) == [4, 1, 3, 1, None, 5]


@given(st.lists(st.none() | st.floats(-5, 5), min_size=1, max_size=20))
def test_ranks_count_better_modules_and_survive_the_round_trip(tmp_path_factory, scores):
    ranking = ranking_of(scores, provenance={"seed": 3, "ünïcode": "✓"})
    known = [score for score in scores if score is not None]
    assert list(ranking.ranks().values()) == [
        None if score is None else 1 + sum(other > score for other in known) for score in scores
    ]
    path = tmp_path_factory.mktemp("ranking") / "ranking.json"
    ranking.save(path)
    assert Ranking.load(path) == Ranking.load(path.parent) == ranking


def test_a_ranking_that_cannot_be_is_refused():
    for scores, errors in (
        ([1.0, math.nan], None),
        ([1.0, -math.inf], None),
        ([1.0, 1.0], [1.0, math.inf]),
    ):
        with pytest.raises(
            RankingError, match=r"finite .* or None, got .* for model.layers.0.b_pr"
        ):
            ranking_of(scores, errors=errors)
    modules = ranking_of([1.0]).modules
    with pytest.raises(RankingError, match=r"each module once, but repeats model.layers.0.a_proj"):
        Ranking((*modules, *modules), "by hand")
    with pytest.raises(RankingError, match="at least one module"):
        Ranking((), "by hand")


def changed(**values):
    """A damage: other values at the top of the file."""
    return lambda text: json.dumps(json.loads(text) | values)


def changed_row(**values):
    """A damage: other values of the first module."""

    def damage(text):
        content = json.loads(text)
        content["modules"][0] |= values
        return json.dumps(content)

    return damage


FINITE = r"`modules\[0\].score` must be a finite number, got "
DAMAGE = [
    (lambda text: text[: len(text) // 2], "must be whole JSON, but it is damaged or cut off"),
    (lambda text: "", "damaged or cut off"),
    (lambda text: "[" * 100_000, "damaged or cut off"),
    (lambda text: "[1, 2]", "must be a ranking file"),
    (changed(schema="other"), "must be a ranking file"),
    (changed(schema_version=9), "`schema_version` must be 1, got 9"),
    (changed(modules=3), "`modules` must be a list, got 3"),
    (changed(modules=[3]), r"`modules\[0\]` must be a mapping, got 3"),
    (changed(modules=[]), "must hold at least one module"),
    (changed(method=None), "`method` must be text, got None"),
    (changed(method="a" * 2000), "`method` must be shorter, got 'aaa"),
    (changed_row(projection="a" * 2000), "projection` must be shorter, got"),
    (changed_row(block_index=0.5), r"`modules\[0\].block_index` must be a whole number, got 0.5"),
    (changed_row(num_parameters=0), "num_parameters` must be greater than or equal to 1, got 0"),
    (changed_row(score="high"), FINITE + "'high'"),
    (changed_row(score=math.nan), FINITE + "nan"),
    (changed_row(score=True), FINITE + "True"),
    (changed_row(score=10**400), FINITE + "1000"),
    (changed_row(standard_error=math.inf), "standard_error` must be a finite number, got inf"),
    (changed_row(standard_error=-1), "standard_error` must be greater than or equal to 0, got -1"),
    (changed(provenance=3), "`provenance` must be a mapping, got 3"),
    *[
        (changed(provenance=made_by), f"`provenance.*{said}")
        for made_by, said in [
            ({"options": 5}, "options` must be a mapping, got 5"),
            ({"model": None}, "model` must be a mapping, got None"),
            ({"data": []}, r"data` must be a mapping, got \[\]"),
            ({"stage_1": 3}, "stage_1` must be a mapping, got 3"),
            ({"mask": {"losses": 3, "seconds": 1}}, "mask.losses` must be a list, got 3"),
            ({"mask": {"losses": []}}, "mask.seconds` must be there, got nothing"),
            ({"held_out_loss_nats": {"base": "x"}}, "base` must be a finite number, got 'x'"),
            ({"options": {"lora_rank": 0}}, "lora_rank` must be greater than or equal to 1"),
        ]
    ],
    (changed(provenance={"unknown": [math.nan]}), "`provenance` must be JSON with finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_files_are_refused_with_one_line(tmp_path, damage, message):
    path = tmp_path / "ranking.json"
    ranking_of([1.0, 2.0]).save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RankingError, match=message) as caught:
        Ranking.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RankingError, match=r"must exist, but there is no '.*nowhere.json'"):
        Ranking.load(tmp_path / "nowhere.json")


OPEN = (
    "at budget {} of 6 modules), {} not decided by the data (marked ~): {} 95 % interval contains"
)
# standard errors, budget -> marked ranks, the line under the table
SHOWN = [
    ([0.1, 0.1, 0.3, 0.1, 0.1, 0.1], "0.5", "3", OPEN.format("0.5 (3", "1 module is", "its")),
    ([0.1, 0.9, 0.1, 0.1, 0.1, None], "0.3", "2", OPEN.format("0.3 (2", "1 module is", "its")),
    ([0.1, 0.9, 0.1, 0.1, 0.1, None], "0.3", "2", "contains the cut; 1 without an interval"),
    ([9.0] * 6, "0.4x-params", "123456", OPEN.format("0.4x-params (2", "6 modules are", "their")),
    ([9.0] * 6, "6", "", "at budget 6 (6 of 6 modules), every module's place is decided"),
    (None, "0.3", "", "no intervals: the method gives none"),
]


def file_of(tmp_path, errors, scores=(6.0, 5.0, 4.0, 3.0, 2.0, 1.0)):
    ranking_of(list(scores), errors=errors).save(tmp_path / "ranking.json")
    return tmp_path


@pytest.mark.parametrize(("errors", "budget", "marked", "line"), SHOWN)
def test_show_marks_what_the_data_do_not_decide(tmp_path, capsys, errors, budget, marked, line):
    assert keylayers("show", file_of(tmp_path, errors), "--budget", budget) == 0
    out = capsys.readouterr().out
    assert "".join(re.findall("^~ *([0-9])", out, re.MULTILINE)) == marked
    assert line in " ".join(out.split())


def test_show_writes_what_is_decided_as_json(tmp_path, capsys):
    folder = file_of(tmp_path, [0.1, None, 0.1, 0.9], scores=(1.0, 2.0, 4.0, 3.0))
    assert keylayers("show", folder, "--json", "--budget", "0.5") == 0
    text = capsys.readouterr().out
    content = json.loads(text)
    assert content["budget"] == "0.5"
    assert [module["decided"] for module in content["modules"]] == [True, False, None, True]
    (tmp_path / "shown.json").write_text(text)
    shown, own = Ranking.load(tmp_path / "shown.json"), Ranking.load(folder)
    assert shown.ranks() == {module.name: own.ranks()[module.name] for module in shown.modules}


def test_show_shows_a_ranking_whose_budget_reaches_modules_without_a_score(tmp_path, capsys):
    folder = file_of(tmp_path, [0.1, *[None] * 5], scores=(1.0, *[None] * 5))
    assert keylayers("show", folder) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "nothing is marked at budget 0.3: the budget must stay within" in out
    assert keylayers("show", folder, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert [module["decided"] for module in content["modules"]] == [None] * 6


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_show_refuses_a_budget_that_cannot_be(tmp_path, capsys, form):
    messages = {"auto": "auto is for `keylayers train`", "7": "between 1 and 6", "x": "must be a f"}
    for budget, message in messages.items():
        assert keylayers("show", file_of(tmp_path, None), "--budget", budget, *form) == 2
        captured = capsys.readouterr()
        assert (message in captured.err, captured.out) == (True, "")
