# SPDX-License-Identifier: Apache-2.0
"""Recipes are planned without a network, and what they build on holds."""

import json
import re
from pathlib import Path

import pytest

from commands import keylayers
from studies import plan_of

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
SMALL = sorted((ROOT / "recipes" / "small").glob("*.yaml"))


@pytest.mark.parametrize("path", [*PAPER, *SMALL], ids=lambda path: "/".join(path.parts[-2:]))
def test_every_recipe_is_planned_offline(path):
    from keylayers.commands.study_cells import check

    cells = plan_of(path)
    check(cells)
    assert {"stage-1", "ranking"} <= {cell.kind for cell in cells}
    has_budget = "budget" in path.read_text(encoding="utf-8")
    assert ("training" in {cell.kind for cell in cells}) == has_budget


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


def test_the_small_recipes_share_cells_on_the_files_of_the_demo(demo_files, monkeypatch, capsys):
    monkeypatch.chdir(demo_files)
    assert keylayers("study", *SMALL, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {path.stem for path in SMALL} <= {path.stem for path in PAPER}
    names = [cell.name for path in SMALL for cell in plan_of(path)]
    assert len(lines) == len(set(names)) < len(names)


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


def test_a_ranking_that_ranks_nothing_is_no_row_of_the_record(tmp_path, monkeypatch):
    """`agreement.csv` has empty fields then."""
    path = tmp_path / "agreement.csv"
    path.write_text(
        "differs,first,second,best,jaccard,chance_jaccard,tau,top_weighted_tau\n"
        "seed,0,1,0.3,,,,\nseed,0,2,0.3,0.5,0.2,0.25,0.1\n"
    )
    monkeypatch.syspath_prepend(ROOT / "experiments")
    from small_study import agreement_rows

    (row,) = agreement_rows(path)
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
