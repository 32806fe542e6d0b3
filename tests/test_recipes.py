# SPDX-License-Identifier: Apache-2.0
"""Recipes are planned without a network; what studies have for them does what it says."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from commands import keylayers

from rankings import ranking_of

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
SMALL = sorted((ROOT / "recipes" / "small").glob("*.yaml"))


def plans(paths, root=Path("study"), settings=()):
    from keylayers.commands.study.files import plan_files

    contents = {path: yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths}
    return {one.name: one for one in plan_files(contents, root, settings)}


@pytest.fixture(scope="module")
def paper():
    """The plan of every recipe of the paper, by name."""
    return plans(PAPER)


@pytest.mark.parametrize("name", [path.stem for path in PAPER])
def test_every_recipe_of_the_paper_is_planned_offline_with_its_cost(paper, name):
    from keylayers.commands.study.estimate import downloads, estimate

    cells = paper[name].cells
    assert {"stage-1", "ranking"} <= {cell.kind for cell in cells}
    for cell in cells:
        found = estimate(cell)
        assert bool(found.unknown) == (cell.kind == "evaluation")
        if not found.unknown:
            assert found.operations > 1e12
            assert found.peak_bytes > 2**30
    assert all(downloads(cells).values())


def test_a_dry_run_of_recipes_says_what_they_cost(capsys):
    paths = [path for path in PAPER if path.stem in ("cross-model", "qlora", "reasoning")]
    assert keylayers("study", *paths, "--dry-run") == 0
    out = capsys.readouterr().out
    for name in ("Llama-3.1-8B", "Mistral-7B-v0.1", "GAIR/lima", "GAIR/LIMO", "s1K-1.1"):
        assert re.search(rf"{re.escape(name)} +[\d.]+ [MG]B", out), name
    (total,) = re.findall(r"^all +(\d+) +(\d+) +(\d+) +([\d,.]+) h +(\d+) GiB", out, re.MULTILINE)
    num_cells, to_do, num_unknown, hours, gib = (float(one.replace(",", "")) for one in total)
    assert num_cells == to_do == int(re.search(r"(\d+) cells, 0 of them", out)[1])
    assert num_unknown == out.count("\nevaluation-")
    assert hours > 10
    assert gib > 15  # the weights alone
    assert "Evaluations come on top" in out


def test_every_line_of_a_recipe_of_the_paper_says_where_it_comes_from():
    structure = re.compile(r"(options|grid|evaluate): *(#.*)?|  +- .*|  +\S+: *#.*")
    for path in PAPER:
        text = path.read_text(encoding="utf-8")
        assert '"memory" is' in text
        told = False
        for line in text.splitlines():
            if line.strip().startswith("#"):
                told = True  # for the lines up to the next option that says so itself
            elif "#" not in line and not structure.fullmatch(line):
                is_plain = line.strip().split(":")[0] in ("method", "seed", "lora_alpha")
                assert told or is_plain, f"{path.name}: {line}"


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory):
    """A folder with what `keylayers demo --files-only` writes below `demo`."""
    folder = tmp_path_factory.mktemp("small")
    assert keylayers("demo", "--output", folder / "demo", "--files-only") == 0
    return folder


def test_every_small_recipe_is_planned_on_the_files_of_the_demo(demo_files, monkeypatch, capsys):
    monkeypatch.chdir(demo_files)
    assert keylayers("study", *SMALL, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "not known:" not in out
    assert "from the hub" not in out
    assert {path.stem for path in SMALL} <= {path.stem for path in PAPER}
    found = plans(SMALL)
    together = {cell.name for one in found.values() for cell in one.cells}
    assert len(together) < sum(len(one.cells) for one in found.values())  # shared
    assert f"{len(together)} cells, 0 of them finished" in out


def test_the_files_of_the_demo_are_its_model_and_data(demo_files, tmp_path, capsys):
    from keylayers.demo.files import BASE
    from keylayers.demo.world import STYLES

    for path in BASE.iterdir():
        assert (demo_files / "demo" / "model" / path.name).read_bytes() == path.read_bytes()
    for style in STYLES:
        assert (demo_files / "demo" / f"{style}.jsonl").stat().st_size > 10_000
    assert keylayers("demo", "--output", demo_files / "demo", "--files-only") == 0  # again
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    assert keylayers("demo", "--output", tmp_path, "--files-only") == 2
    assert "must have room for the built-in model" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine.txt"]


def written(folder, name="study", **content):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def flags(cell, flag):
    """The values that a cell's commands give a flag."""
    return [words[words.index(flag) + 1] for words in cell.commands if flag in words]


def test_a_ranking_of_one_data_set_is_trained_on_another(tmp_path):
    grid = {
        "data": ["a.jsonl", "b.jsonl"],
        "train_data": ["a.jsonl", "b.jsonl"],
        "budget": [0.3, 1.0],
    }
    path = written(tmp_path, options={"model": "m", "steps": 5}, grid=grid, verify=False)
    cells = plans([path])["study"].cells
    counts = Counter(cell.kind for cell in cells)
    # all modules are all modules whatever ranked them: one training for each data set
    assert counts == {"stage-1": 2, "ranking": 2, "training": 2 * 2 + 2}
    for cell in cells:
        (point, *_) = cell.points
        read = point["train_data"] if cell.kind == "training" else point["data"]
        assert flags(cell, "--data") == [read]
        assert "train_data" not in " ".join(cell.commands[0])
        if cell.kind != "training":
            assert all("train_data" not in one for one in cell.points)
    own = written(tmp_path, "own", options={"model": "m", "steps": 5}, grid={**grid})
    content = yaml.safe_load(own.read_text())
    del content["grid"]["train_data"]
    own.write_text(yaml.safe_dump({**content, "verify": False}))
    same = {cell.name for cell in plans([own])["own"].cells}
    assert same < {cell.name for cell in cells}  # trained on the ranking's own data


def test_a_ranking_of_one_model_is_trained_on_another(tmp_path):
    options = {"model": "a", "data": "d", "train_model": "b", "budget": 0.3}
    *others, trained = plans([written(tmp_path, options=options)])["study"].cells
    assert flags(trained, "--model") == ["b"]
    assert flags(others[0], "--model") == ["a"]


def test_all_modules_are_trained_again_for_another_stage_1_that_sets_the_steps(tmp_path):
    grid = {"max_steps": [10, 20], "budget": [1.0]}
    base = {"model": "m", "data": "d"}
    counts = {
        steps: Counter(
            cell.kind
            for cell in plans([written(tmp_path, options=base | own, grid=grid)])["study"].cells
        )["training"]
        for steps, own in ((None, {}), (5, {"steps": 5}))
    }
    assert counts == {None: 2, 5: 1}


def test_options_that_are_given_anew_take_the_place_of_those_of_the_file(tmp_path):
    grid = {"data": ["a.jsonl", "b.jsonl"], "seed": [0, 1]}
    path = written(tmp_path, options={"model": "m"}, grid=grid)
    (study,) = plans([path], settings=["model=other", "seed=[5]", "data=c.jsonl"]).values()
    assert study.study.options["model"] == "other"
    assert [one.label for one in study.study.grid["data"]] == ["c.jsonl"]
    assert {seed for cell in study.cells for seed in flags(cell, "--seed")} == {"5"}


def test_options_at_their_defaults_make_the_same_cells(tmp_path):
    base = {"model": "m", "data": "d", "budget": 0.3}
    usual = {"seed": 0, "lora_rank": 16, "method": "elimination", "held_out": 0.1, "points": 15}
    found = [
        [cell.name for cell in plans([written(tmp_path, options=options)])["study"].cells]
        for options in (base, base | usual)
    ]
    assert found[0] == found[1]


REFUSED = [
    (["a.yaml", "b/a.yaml"], (), "must have names of their own"),
    ([], (), "at least one study file must be given"),
    (["a.yaml"], ("--set", "seed"), "`set` must be name=value"),
    (["a.yaml"], ("--set", "sede=3"), "did you mean 'seed'"),
    (["a.yaml"], ("--set", "compare_me=[1]"), "every option of a study"),
    (["a.yaml"], ("--device-tflops", "3"), "must be left out without `dry_run`"),
    (["a.yaml"], ("--dry-run", "--device-tflops", "0"), "`device_tflops` must be above 0"),
    (["wrong.yaml"], ("--dry-run",), "`compare` of a study must be a list of shares"),
    (["eval.yaml"], ("--dry-run",), "got 'taskss', did you mean 'tasks'"),
    (["late.yaml"], ("--dry-run",), "`seed` must be"),
    (["much.yaml"], ("--dry-run",), "`budget` must be .* got 'much'"),
]


@pytest.mark.parametrize(("names", "more", "message"), REFUSED)
def test_what_cannot_be_run_is_one_clear_line(tmp_path, monkeypatch, capsys, names, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    good = {"options": {"model": "m", "data": "d"}, "grid": {"seed": [0]}}
    written(tmp_path, "a", **good)
    written(tmp_path / "b", "a", **good)
    written(tmp_path, "wrong", **good, compare=[30])
    written(tmp_path, "eval", **good, evaluate={"taskss": ["mmlu"]})
    written(tmp_path, "much", options={**good["options"], "budget": "much"})
    written(tmp_path, "late", options=good["options"], grid={"seed": [0, 1, -1]})
    assert keylayers("study", *names, *more) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "study").exists()


def test_commands_that_hold_nothing_new_are_not_checked_again(paper):
    from keylayers.commands.study.distinct import distinct_commands

    cells = [cell for one in paper.values() for cell in one.cells]
    checked = list(distinct_commands(cells))
    assert len(checked) < 100 < len(cells)
    values = {(word, words[0]) for cell in cells for words in cell.commands for word in words}
    for word, command in values:
        if word.startswith("--") and command not in ("train", "verify"):
            assert any(word in words and words[0] == command for words in checked), word


def test_rankings_that_differ_in_one_axis_are_compared(tmp_path):
    from keylayers.commands.study.agreement import agreement_means, agreement_table
    from keylayers.commands.study.cell import CellState
    from keylayers.commands.study.plan import Cell
    from keylayers.ranking.compare import chance_jaccard

    orders = {("x", "0"): [4, 3, 2, 1], ("x", "1"): [4, 3, 1, 2], ("y", "0"): [1, 2, 3, 4]}
    orders[("flat", "1")] = [1, 1, 1, 1]
    cells = []
    for (data, seed), scores in orders.items():
        cell = Cell("ranking", f"{data}{seed}", (), (), ({"data": data, "seed": seed},))
        cells.append(cell)
        folder = tmp_path / "cells" / cell.name
        folder.mkdir(parents=True)
        ranking_of([float(one) for one in scores]).save(folder / "ranking.json")
    states = {cell.name: CellState("finished") for cell in cells}
    table = agreement_table(tmp_path, cells, states, ["data", "seed"], [0.5])
    with_flat = table["second"] == "flat"
    assert with_flat.sum() == 1  # with x1
    assert table.loc[with_flat, ["jaccard", "chance_jaccard", "tau"]].isna().all(axis=None)
    table = table[~with_flat]
    rows = table.set_index("differs")
    assert sorted(rows.index) == ["data", "seed"]  # x0 with y0, and x0 with x1
    assert rows.loc["seed", ["first", "second", "data"]].tolist() == ["0", "1", "x"]
    assert rows.loc["seed", "jaccard"] == 1.0
    assert rows.loc["data", "jaccard"] == 0.0
    assert rows.loc["data", "tau"] == -1.0
    assert rows.loc["data", "chance_jaccard"] == chance_jaccard(4, 2, 2)
    means = agreement_means(table, ["data", "seed"], "seed")
    assert means["differs"].tolist() == ["data", "seed"]
    assert means.loc[means["differs"] == "seed", "first"].tolist() == ["one"]


def test_a_ranking_that_ranks_nothing_is_no_row_of_the_record(tmp_path):
    """`agreement.csv` has empty fields then."""
    path = tmp_path / "agreement.csv"
    path.write_text(
        "differs,first,second,best,jaccard,chance_jaccard,tau,top_weighted_tau\n"
        "seed,0,1,0.3,,,,\nseed,0,2,0.3,0.5,0.2,0.25,0.1\n"
    )
    made = runpy.run_path(str(ROOT / "experiments" / "results.py"))
    (row,) = made["agreement_rows"](path)
    assert row["point"] == {"differs": "seed", "first": "0", "second": "2"}
    assert row["jaccard"] == 0.5


@pytest.mark.long
def test_a_shorter_stage_1_is_the_checkpoint_of_a_longer_one(tiny, tmp_path):
    """What recipes/*/checkpoints.yaml builds on."""
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--epsilon", "0")
    losses = {}
    for steps in (3, 12):
        place = tmp_path / str(steps)
        more = ("--method", "update-norm", "--max-steps", steps, "--output", place)
        assert keylayers("rank", *options, *more) == 0
        made_by = json.loads((place / "ranking.json").read_text())["provenance"]
        losses[steps] = made_by["stage_1"]["losses"]
    assert losses[3] == losses[12][:3]


@pytest.mark.long
def test_studies_that_share_cells_evaluate_and_compare(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {
        **{"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "save_steps": 0},
        **{"lora_rank": 4, "max_steps": 3, "steps": 3, "method": "update-norm", "epsilon": 0.0},
    }
    grid = {"seed": [0, 1], "budget": [0.3]}
    first = written(
        tmp_path, "first", options=options, grid=grid, verify=False, compare=[0.3, 0.75]
    )
    second = written(
        tmp_path,
        "second",
        options=options,
        grid=grid | {"budget": [0.3, 1.0]},
        verify=False,
        evaluate={"forgetting_data": str(tiny / "data.jsonl"), "forgetting_examples": 8},
    )
    assert keylayers("study", first, second, "--output", "out", "--workers", "1") == 0
    out = capsys.readouterr().out
    assert "Agreement of rankings" in out
    assert "forgetting: loss" in out
    pairs = pd.read_csv(tmp_path / "out" / "first" / "agreement.csv")
    assert pairs["best"].tolist() == [0.3, 0.75]
    assert set(pairs["differs"]) == {"seed"}
    table = pd.read_csv(tmp_path / "out" / "second" / "results.csv")
    losses = table[table["measure"] == "forgetting: loss"]
    assert len(losses) == 4
    assert set(losses["kind"]) == {"evaluation"}
    base = table[table["measure"] == "forgetting: loss, base model"]
    assert base["value"].nunique() == 1
    shared = pd.read_csv(tmp_path / "out" / "first" / "results.csv")["cell"]
    assert set(shared) < set(table["cell"])
    assert len(list((tmp_path / "out" / "cells").iterdir())) == table["cell"].nunique()


def test_the_page_of_results_comes_from_the_record():
    made = runpy.run_path(str(ROOT / "experiments" / "results.py"))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert made["page"]() == text
    for make in made["TABLES"]:
        assert make() in text, make.__name__
