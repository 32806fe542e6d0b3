# SPDX-License-Identifier: Apache-2.0
"""A study file as cells: what is shared, what a cell is known by, and files that are refused."""

import re

import pytest
import yaml

from test_rank import keylayers
from test_study import METHODS, plan_of, study_file


def kinds(cells):
    return [cell.kind for cell in cells]


def test_what_is_shared_is_one_cell(tiny, tmp_path):
    grid = {"seed": [0, 1], "method": METHODS, "budget": [0.2, 0.3, 1.0]}
    cells = plan_of(study_file(tmp_path, tiny, **grid))
    # per seed: one stage 1, two rankings, two trainings of each budget, and one of all modules
    assert {kind: kinds(cells).count(kind) for kind in kinds(cells)} == {
        "stage-1": 2,
        "ranking": 4,
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
    cells = plan_of(study_file(tmp_path, tiny, budget=[{"rank_first": True, "freeze": 0.25}]))
    assert kinds(cells) == ["training"]
    assert "--rank-first" in cells[0].commands[0]
    assert cells[0].points == ({"budget": "rank_first True, freeze 0.25"},)


def test_an_update_that_exists_needs_no_stage_1(tiny, tmp_path):
    adapter = {"adapter": str(tiny / "adapter")}
    assert kinds(plan_of(study_file(tmp_path, tiny, adapter, method=METHODS))) == ["ranking"] * 2


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
    ({"grid": {"method": ["elimination", "ilaa"]}}, "ilaa.*--method.*Did you mean"),
    ({"options": {"model": "m", "data": "d", "lora_rank": 0}}, "`lora_rank` must be at least 1"),
    (
        {"options": {"model": "m" * 300, "data": "d"}},
        "must be a file, a folder or a name.*too long",
    ),
    ({"grid": {"budget": [{"budget": 0.3, "freeze": 0.2}]}}, "exactly one of `budget`"),
    (
        {"grid": {"budget": [{"freeze": "much"}]}},
        "must be of the kinds that `keylayers train` takes",
    ),
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
    assert "6 cells, 0 of them finished" in out
    assert not (tmp_path / "out").exists()
