# SPDX-License-Identifier: Apache-2.0
"""A study file as cells: what is shared, what names a cell, and files that are refused."""

import re
from collections import Counter
from pathlib import Path

import pytest

from commands import keylayers
from damage import LARGE, damaged_yaml, fuzz, run
from keylayers.commands import study_cells
from keylayers.errors import ConfigError
from studies import METHODS, plan_of, planned, tiny_study, write

pytestmark = pytest.mark.filterwarnings(LARGE)
BASE = {"model": "m", "data": "d"}
TRAINED = BASE | {"budget": 0.3}
ONLY_RANK = {"verify": False}
DATA = {name: ["a.jsonl", "b.jsonl"] for name in ("data", "train_data")}
# grid, options, other parts of a study -> stages 1, rankings, verifications and trainings
CELLS = [
    # for each seed: two trainings of each method's modules, and one of all modules
    ({"seed": [0, 1], "method": METHODS, "budget": [0.2, 0.3, 1.0]}, {}, {}, (2, 4, 4, 2 * 5)),
    ({}, {"budget": None}, {}, (1, 1, 1, 0)),
    ({}, {"adapter": "a"}, {}, (0, 1, 1, 0)),
    ({}, {"rank_first": True, "freeze": 0.25}, {}, (0, 0, 0, 1)),
    ({"points": [5, 10]}, {"budget": 0.3}, {}, (1, 1, 2, 1)),
    ({"budget": [0.3, "auto"]}, {}, ONLY_RANK, (1, 1, 1, 2)),
    ({"max_steps": [10, 20]}, {"budget": 1.0}, {}, (2, 2, 2, 2)),
    ({**DATA, "budget": [0.3, 1.0]}, {"steps": 5}, ONLY_RANK, (2, 2, 0, 2 * 2 * 2)),
]


@pytest.mark.parametrize(("grid", "options", "parts", "counts"), CELLS)
def test_shared_work_is_one_cell(grid, options, parts, counts):
    cells = planned(grid, parts=parts, **options)
    kinds = ("stage-1", "ranking", "verification", "training")
    assert tuple(len(cells.get(kind, ())) for kind in kinds) == counts


def names(found):
    return {kind: [cell.name for cell in cells] for kind, cells in found.items()}


def folder(cell):
    return f"out/cells/{cell.name}"


def flag(cell, name):
    return cell.words[cell.words.index(name) + 1] if name in cell.words else None


def test_a_cell_is_named_by_what_it_reads_and_not_by_where_that_is(tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "other.jsonl")]
    for path, content in zip(files, ("1", "1", "2"), strict=True):
        path.write_text(content)
    first, moved, other = (names(planned(data=str(path), budget=0.3)) for path in files)
    assert moved == first
    assert all(other[kind] != first[kind] for kind in first)


def test_defaults_nulls_and_options_without_effect_make_the_same_cells():
    usual = {"lora_rank": 16, "method": "elimination", "held_out": 0.1, "points": 15}
    usual |= {"save_steps": 7, "rank_first": False, "path_points": None}
    assert names(planned(budget=0.3)) == names(planned(budget=0.3, **usual))
    assert names(planned(budget=0.3)) != names(planned(budget=0.3, steps=300))  # not stage 1's


def test_other_software_makes_other_cells(monkeypatch):
    made_by, before = study_cells.environment(), names(planned(budget=0.3))
    for part in ("commit", "libraries"):
        monkeypatch.setattr(study_cells, "environment", {**made_by, part: "another"}.copy)
        after = names(planned(budget=0.3))
        assert all(after[kind] != before[kind] for kind in before)


def test_a_training_of_all_modules_needs_the_ranking_that_comes_with_stage_1():
    cells = planned({"method": ["ila", "random"], "budget": [1.0, 0.3]}, steps=5)
    (stage_1,) = cells["stage-1"]
    whole, *others = sorted(cells["training"], key=lambda cell: cell.needs != (stage_1.name,))
    assert folder(stage_1) in whole.words
    assert [point["method"] for point in whole.points] == ["ila", "random"]
    assert [cell.needs[0] for cell in others] == [cell.name for cell in cells["ranking"]]
    assert planned(budget=1)["training"][0].needs == (planned()["ranking"][0].name,)  # one module


def test_only_auto_needs_a_mask_curve():
    budgets = {"budget": [0.3, "auto"]}
    first, other = planned(budgets), planned(budgets, points=20)
    assert (first["stage-1"], first["ranking"]) == (other["stage-1"], other["ranking"])
    ((curve,), (ranking,)) = first["verification"], first["ranking"]
    assert curve.name != other["verification"][0].name
    by_need = {cell.needs: cell for cell in first["training"]}
    assert set(by_need) == {(ranking.name,), (curve.name,)}
    assert folder(curve) in by_need[curve.name,].words
    assert by_need[ranking.name,] == other["training"][0]


def test_a_cell_has_the_labels_that_matter_to_it():
    cells = planned({"seed": [0], "points": [5, 10]}, budget=0.3)
    (seed,) = cells["training"][0].points
    assert cells["stage-1"][0].points == cells["ranking"][0].points == (seed,) == ({"seed": "0"},)
    curves = [cell.points for cell in cells["verification"]]
    assert curves == [({**seed, "points": "5"},), ({**seed, "points": "10"},)]
    (cell,) = planned({"budget": [{"rank_first": True, "freeze": 0.25}]})["training"]
    assert cell.points == ({"budget": "rank_first True, freeze 0.25"},)
    assert "--rank-first" in cell.words


def test_a_training_may_have_another_model_and_other_data():
    cells = planned({**DATA, "budget": [0.3, 1.0]}, parts=ONLY_RANK, steps=5)
    for cell in cells["training"]:
        assert flag(cell, "--data") == cell.points[0]["train_data"]
    for cell in cells["ranking"]:
        assert cell.points == ({"data": flag(cell, "--data")},)
    own = planned({"data": DATA["data"], "budget": [0.3, 1.0]}, parts=ONLY_RANK, steps=5)
    assert {*names(own)["training"]} < {*names(cells)["training"]}
    for options, revision in (({}, None), ({"train_revision": "abc"}, "abc")):
        (cell,) = planned(budget=0.3, revision="abc", train_model="n", **options)["training"]
        assert (flag(cell, "--model"), flag(cell, "--revision")) == ("n", revision)


def test_options_of_a_fine_tune_are_for_the_trainings_where_the_update_is_given():
    cells = planned(adapter="a", budget=0.3, learning_rate=0.1, lora_rank=4)
    study_cells.check([*cells["ranking"], *cells["training"]])
    assert "--lora-rank" not in cells["ranking"][0].words
    assert flag(cells["training"][0], "--lora-rank") == "4"
    with pytest.raises(ConfigError, match=r"none of its cells .* takes `max_steps`"):
        planned(adapter="a", max_steps=5)
    parts = {"granularity": "part", "method": "fisher-pruning"}
    (cell,) = planned(tuned="t", lora_rank=4, **parts)["ranking"]
    assert flag(cell, "--lora-rank") == "4"


def test_an_evaluation_is_of_what_was_trained():
    for options, name in (({"towers": "all"}, "--adapter"), ({"update": "full"}, "--checkpoint")):
        cells = planned(parts={"evaluate": {"tasks": "mmlu"}}, budget=0.3, **options)
        (evaluation,) = cells["evaluation"]
        assert flag(evaluation, name) == folder(cells["training"][0]) + "/tuned"
        assert "--towers" not in evaluation.words
    assert flag(cells["verification"][0], "--tuned") == folder(cells["stage-1"][0]) + "/tuned"


def test_settings_replace_options_and_axes():
    grid = {"data": ["a.jsonl", "b.jsonl"], "seed": [0, 1]}
    cells = planned(grid, ["model=other", "seed=[5]", "data=c.jsonl"])["ranking"]
    assert [cell.points for cell in cells] == [({"data": "c.jsonl", "seed": "5"},)]
    assert (flag(cells[0], "--model"), flag(cells[0], "--data")) == ("other", "c.jsonl")


def test_a_value_never_becomes_a_flag():
    (cell,) = planned(model="--trust-remote-code", report_to=["a", "--output"])["ranking"]
    assert "--model=--trust-remote-code" in cell.words
    assert {"--report-to=a", "--report-to=--output"} < set(cell.words)


def test_a_dry_run_lists_cells_and_commands_and_writes_nothing(tiny, tmp_path, capsys):
    path = tiny_study(tmp_path, tiny, seed=[0, 1], budget=[0.3])
    assert keylayers("study", path, "--dry-run", "--output", tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    for cell, line in zip(plan_of(path, tmp_path / "out"), lines, strict=True):
        assert line.startswith(f"{cell.name} (waiting): keylayers {cell.words[0]} --")
    assert not (tmp_path / "out").exists()


# Parts of a study file, with a model and data where nothing is said -> what is said
REFUSED = [
    ({"grids": {}}, "must hold options, grid, .*`grids` is {}: Extra inputs are not permitted"),
    ({"compare": [30]}, "`compare.0` is 30: Input should be less than 1"),
    ({"grid": {"seed": 1}}, "`grid.seed` is 1: Input should be a valid list"),
    ({"grid": {"seed": [1, 1]}}, "must differ, but 'seed' has '1' twice"),
    ({"grid": {"kind": [{"seed": 1}]}}, "named like a column of results, got kind"),
    ({"grid": {"sede": [1]}}, "takes `sede`, did you mean 'seed'"),
    ({"grid": {"seed": [0, -1]}}, "`seed` must be from 0"),
    ({"grid": {"seed": [*range(200)], "steps": [*range(200)]}}, "at most 10,000 combinations"),
    ({"grid": {"method": ["elimination", "ilaa"]}}, '"ilaa" for --method.*"ila"'),
    ({"options": {"model": "m" * 300, "data": "d"}}, "must be a path or a name.*too long"),
    ({"options": {**BASE, "lora-rank": 4, "lora_rank": 8}}, "must give each name once"),
    ({"options": {**BASE, "max_steps": "abc"}}, '--max-steps: unable to convert "abc" into int'),
    ({"options": {**BASE, "max_steps": 10**400}}, "`max_steps` of a study must be a text or a num"),
    ({"options": {**BASE, "revision": {"a": 1}}}, "`revision` of a study must be a text"),
    ({"options": {**BASE, "output": "x"}}, "takes `output`"),
    ({"options": {**BASE, "budget": "much"}}, "`budget` must be .* got 'much'"),
    ({"options": {**TRAINED, "freeze": 0.2}}, "exactly one of `budget`"),
    ({"options": {**TRAINED, "train_max_length": "abc"}}, "--max-length: unable to"),
    # Options that no cell takes
    ({"options": {**BASE, "points": 4}, "verify": False}, "takes `points`; leave"),
    ({"options": BASE, "grid": {"order_seed": [0, 1]}, "verify": False}, "takes `order_seed`"),
    ({"options": {**BASE, "steps": 100}}, "takes `steps`"),
    ({"options": {**BASE, "freeze": 0.3, "rank_first": True, "train_data": "x"}}, "`train_data`"),
    ({"evaluate": {"tasks": ["mmlu"]}}, "takes `evaluate: tasks`"),
    ({"options": TRAINED, "evaluate": {"taskss": ["m"]}}, "takes `evaluate: taskss`"),
    ({"options": TRAINED, "evaluate": {"model": "x"}}, "takes `evaluate: model`"),
    ({"options": TRAINED, "evaluate": {"tasks": "m", "limit": "few"}}, "--limit"),
]


def refused(capsys, message, *words):
    assert keylayers("study", *words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_a_study_file_that_cannot_be_run_is_one_clear_line(tmp_path, capsys, content, message):
    path = write(tmp_path, **{"options": BASE, **content})
    refused(capsys, message, path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


WORDS = [
    (["a.yaml", "b/a.yaml"], "must be files with different names"),
    ([], "must be files with different names"),
    (["a.yaml", "--set", "seed"], "`set` must be name=value"),
    (["a.yaml", "--set", "sede=3"], "did you mean 'seed'"),
    (["a.yaml", "--set", "lora-rank=3"], "must replace all of axis 'size', which sets 'lora_rank'"),
    (["a.yaml", "--workers", "0"], "`workers` must be at least 1"),
    (["a.yaml", "--ray-address", "auto", "--workers", "2"], "left out with `ray_address`"),
    (["a.yaml", "--ray-address", "127.0.0.1:1"], "of a running cluster, got '127.0.0.1:1'"),
    (["a.yaml", "--ray-address", "somewhere"], "of a running cluster, got 'somewhere'"),
]


@pytest.mark.enable_socket
@pytest.mark.parametrize(("words", "message"), WORDS)
def test_words_that_cannot_be_used_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    grid = {"seed": [0], "size": [{"name": "small", "lora_rank": 4}]}
    write(tmp_path, "a", options=BASE, grid=grid)
    write(tmp_path / "b", "a", options=BASE)
    refused(capsys, message, *words)
    assert not (tmp_path / "study" / "results.csv").exists()


STUDY = {
    "options": {**BASE, "max_steps": 3, "epsilon": 0.1, "train_max_length": 64},
    "grid": {
        "seed": [0, 1],
        "method": ["ila", {"name": "path", "method": "path", "path_points": 2}],
        "budget": [0.3, "1.0x-params", "auto", {"freeze": 0.25}],
    },
    "compare": [0.3],
    "evaluate": {"tasks": ["mmlu"], "limit": 3},
}


@pytest.mark.long
def test_a_damaged_study_file_is_refused_in_one_line_or_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = Counter()

    def check(content):
        Path("study.yaml").write_bytes(content)
        codes[run("study", "study.yaml", "--dry-run")] += 1
        assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]

    fuzz(check, damaged_yaml(STUDY), 300)
    assert set(codes) == {0, 2}
