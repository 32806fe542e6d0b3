# SPDX-License-Identifier: Apache-2.0
"""A study file as cells: what is shared, what a cell is known by, and files that are refused."""

import re
from pathlib import Path

import pytest
import yaml

from commands import keylayers
from test_study import METHODS, plan_of, study_file

BASE = {"model": "m", "data": "d"}


def kinds(cells):
    return [cell.kind for cell in cells]


def test_what_is_shared_is_one_cell(tiny, tmp_path):
    grid = {"seed": [0, 1], "method": METHODS, "budget": [0.2, 0.3, 1.0]}
    cells = plan_of(study_file(tmp_path, tiny, **grid))
    # per seed: one stage 1, two rankings with their mask curves, two trainings of each budget, and
    # one of all modules
    assert {kind: kinds(cells).count(kind) for kind in kinds(cells)} == {
        "stage-1": 2,
        "ranking": 4,
        "verification": 4,
        "training": 2 * (2 * 2 + 1),
    }
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for index, cell in enumerate(cells):
        assert set(cell.needs) <= set(names[:index])
    served = sum(len(cell.points) for cell in cells if cell.kind == "training")
    assert served == 2 * 2 * 3
    assert all("budget" not in point for cell in cells[:2] for point in cell.points)


def test_a_cell_is_known_by_what_it_reads_and_not_by_where_that_is(tiny, tmp_path):
    first = plan_of(study_file(tmp_path, tiny, seed=[0]))
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes((tiny / "data.jsonl").read_bytes())
    again = plan_of(study_file(tmp_path, tiny, {"data": str(copied)}, seed=[0]))
    assert [cell.name for cell in again] == [cell.name for cell in first]
    other = tmp_path / "other.jsonl"
    other.write_bytes((tiny / "data.jsonl").read_bytes() + b"\n")
    changed = plan_of(study_file(tmp_path, tiny, {"data": str(other)}, seed=[0]))
    assert not {cell.name for cell in changed} & {cell.name for cell in first}
    saved = plan_of(study_file(tmp_path, tiny, {"save_steps": 1}, seed=[0]))
    assert [cell.name for cell in saved] == [cell.name for cell in first]


def test_a_run_that_ranks_inside_itself_needs_no_ranking(tiny, tmp_path):
    unused = dict.fromkeys(("points", "random_orders"))
    budget = [{"rank_first": True, "freeze": 0.25}]
    cells = plan_of(study_file(tmp_path, tiny, unused, budget=budget))
    assert kinds(cells) == ["training"]
    assert "--rank-first" in cells[0].commands[0]
    assert cells[0].points == ({"budget": "rank_first True, freeze 0.25"},)


def test_an_update_that_exists_needs_no_stage_1(tiny, tmp_path):
    adapter = {"adapter": str(tiny / "adapter")}
    cells = plan_of(study_file(tmp_path, tiny, adapter, method=METHODS))
    assert kinds(cells) == ["ranking", "verification"] * 2


# What a study file holds -> what is said.
REFUSED = [
    (
        {"grids": {}},
        "must hold options, grid, verify, compare and evaluate and nothing else, .* has 'grids'",
    ),
    ({"options": []}, "`options` of a study must map names to values, but in .* it is a list"),
    ({"verify": 1}, "`verify` of a study must be true or false, got 1"),
    ({"grid": {"seed": 1}}, "must be a list with an entry at least, but 'seed' is 1"),
    ({"grid": {"seed": [1, 1]}}, "every entry of an axis must be another, but 'seed' has 1 twice"),
    ({"grid": {"sede": [1]}}, "got 'sede', did you mean 'seed'?"),
    ({"options": {"data": "d"}}, "must say which `model`"),
    ({"options": {"model": "m"}}, "must say which `data`"),
    (
        {"grid": {"method": ["elimination", "ilaa"]}},
        "`method` must be one of .*'ilaa', did you mean 'ila'",
    ),
    ({"options": {"model": "m", "data": "d", "lora_rank": 0}}, "`lora_rank` must be at least 1"),
    (
        {"options": {"model": "m" * 300, "data": "d"}},
        "must be a file, a folder or a name.*too long",
    ),
    ({"grid": {"budget": [{"budget": 0.3, "freeze": 0.2}]}}, "exactly one of `budget`"),
    ({"grid": {"budget": [{"freeze": "much"}]}}, "`freeze` must be a finite number, got 'much'"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_a_study_file_that_cannot_be_run_is_one_clear_line(tmp_path, capsys, content, message):
    path = tmp_path / "study.yaml"
    base = {"options": {"model": "m", "data": "d"}}
    path.write_text(yaml.safe_dump({**base, **content}))
    assert keylayers("study", path, "--output", tmp_path / "out") == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_every_cell_and_writes_nothing(tiny, tmp_path, capsys):
    path = study_file(tmp_path, tiny, seed=[0, 1], budget=[0.3])
    assert keylayers("study", path, "--dry-run", "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out
    for cell in plan_of(path):
        assert cell.name in out
    assert "8 cells, 0 of them finished" in out
    assert not (tmp_path / "out").exists()


def planned(grid=None, settings=(), **options):
    """The cells of a study by kind, without a file."""
    from keylayers.commands.study.files import plan_files

    content = {"options": BASE | options, "grid": grid or {}}
    (study,) = plan_files({Path("s.yaml"): content}, Path("out"), settings)
    found = {}
    for cell in study.cells:
        found.setdefault(cell.kind, []).append(cell)
    return found


def folder(cell):
    return f"out/cells/{cell.name}"


def test_a_training_of_all_modules_needs_the_ranking_that_stage_1_makes_and_no_scores():
    cells = planned({"method": ["ila", "random"], "budget": [1.0, 0.3]}, steps=5)
    (stage_1,) = cells["stage-1"]
    whole, *others = sorted(cells["training"], key=lambda cell: cell.needs != (stage_1.name,))
    assert whole.needs == (stage_1.name,)
    assert folder(stage_1) in whole.commands[0]
    assert [point["method"] for point in whole.points] == ["ila", "random"]
    assert [one.needs[0] for one in others] == [one.name for one in cells["ranking"]]


# Options whose rankings are of other modules each -> trainings of all modules that they take.
OTHER_MODULES = [
    ({"adapter": ["qv", "all"]}, {}),
    ({"towers": ["language", "all"]}, {"train_towers": "all"}),
    ({"model": ["m", "n"]}, {"train_model": "n"}),
]


@pytest.mark.parametrize(("grid", "options"), OTHER_MODULES)
def test_all_modules_of_other_rankings_are_other_modules(grid, options):
    trained = planned(grid, budget=1.0, steps=5, **options)["training"]
    assert len(trained) == 2
    assert len({one.needs for one in trained}) == 2


def test_other_software_makes_other_cells(monkeypatch):
    from keylayers.commands.study import plan
    from keylayers.environment import environment

    made_by, before = environment(), planned(budget=0.3)
    for part, other in (
        ("commit", "another"),
        ("libraries", {**made_by["libraries"], "torch": "another"}),
    ):
        monkeypatch.setattr(plan, "environment", lambda made=made_by | {part: other}: made)
        after = planned(budget=0.3)
        for kind, (cell,) in before.items():
            assert after[kind][0].name != cell.name, (part, kind)


def test_mask_curves_are_cells_of_their_own_that_only_auto_needs():
    budgets = {"budget": [0.3, "auto"]}
    first, other = planned(budgets), planned(budgets, points=20)
    for kind in ("stage-1", "ranking"):
        assert first[kind] == other[kind]
    ((curve,), (ranking,)) = first["verification"], first["ranking"]
    assert curve.name != other["verification"][0].name
    assert curve.needs == (ranking.name,)
    (command,) = curve.commands
    assert command[:3] == ("verify", "--ranking", folder(ranking))
    by_need = {cell.needs: cell for cell in first["training"]}
    assert set(by_need) == {(ranking.name,), (curve.name,)}
    assert folder(curve) in by_need[curve.name,].commands[0]
    assert by_need[ranking.name,] == other["training"][0]
    assert by_need[curve.name,].name != other["training"][1].name


def test_an_axis_of_mask_curves_makes_no_difference_to_trainings():
    cells = planned({"points": [5, 10]}, budget=0.3)
    assert [len(cells[kind]) for kind in ("ranking", "verification", "training")] == [1, 2, 1]
    assert cells["training"][0].points == ({},)
    assert [one.points for one in cells["verification"]] == [
        ({"points": "5"},),
        ({"points": "10"},),
    ]


def test_options_that_a_training_inherits_are_not_those_of_another_model():
    (trained,) = planned(budget=0.3, revision="abc", train_model="n")["training"]
    assert "--revision" not in trained.commands[0]
    for own in ({"train_model": "m"}, {"train_model": "n", "train_revision": "abc"}):
        (trained,) = planned(budget=0.3, revision="abc", **own)["training"]
        assert "abc" in trained.commands[0]


def test_null_and_false_are_options_that_are_not_given():
    cells = planned({"budget": [None, 0.3], "rank_first": [False]}, lora_rank=None)
    assert len(cells["training"]) == 1
    assert cells["training"][0].name == planned(budget=0.3)["training"][0].name
    assert "training" not in planned(budget=None)


def test_towers_are_no_option_of_an_evaluation():
    from keylayers.commands.study.files import plan_files

    content = {"options": BASE | {"towers": "all", "budget": 0.3}, "evaluate": {"tasks": "mmlu"}}
    (study,) = plan_files({Path("s.yaml"): content}, Path("out"))
    evaluation = study.cells[-1]
    assert evaluation.kind == "evaluation"
    assert "--towers" not in evaluation.commands[0]
