# SPDX-License-Identifier: Apache-2.0
"""Recipes are planned without a network, and what they say and build on holds."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from commands import keylayers, read
from eval_files import evaluation_of
from keylayers.commands.study_cells import check
from keylayers.demo.world import BASE, STYLES
from keylayers.ranking.ranked_module import RankedModule
from studies import plan_of
from tiny_files import add_noise

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
SMALL = sorted((ROOT / "recipes" / "small").glob("*.yaml"))


@pytest.mark.parametrize("path", [*PAPER, *SMALL], ids=lambda path: "/".join(path.parts[-2:]))
def test_every_recipe_is_planned_offline(path):
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
    losses, options = {}, ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    options += ("--method", "update-norm", "--epsilon", "0", "--max-steps")
    for steps in (3, 12):
        assert keylayers("rank", *options, steps, "--output", tmp_path / str(steps)) == 0
        losses[steps] = read(tmp_path / str(steps))["provenance"]["stage_1"]["losses"]
    assert losses[3] == losses[12][:3]


MMLU = (ROOT / "recipes" / "mmlu" / "README.md").read_text()


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", MMLU, re.DOTALL)
    return found


def test_two_adapters_on_six_subjects_of_mmlu_are_near_chance_and_the_table_says_so(
    shared, tmp_path, monkeypatch, capsys
):
    """In the task folder of recipes/mmlu, with the small real model and two adapters of noise."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(shared / "data" / "bench" / "mmlu.zip") as file:
        file.extractall(tmp_path)
    Path("data").rename("mmlu")
    Path("tasks").mkdir()
    Path("tasks", "mmlu.template").write_text(block("yaml"))
    subprocess.run(["bash", "-c", block("bash")], check=True)
    Path("english-2m").symlink_to(shared / "models" / "english-2m")
    torch.manual_seed(0)
    for name in ("one", "two"):
        model = AutoModelForCausalLM.from_pretrained("english-2m", dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        add_noise(tuned, 0.02, "lora_B")
        tuned.save_pretrained(name)
    arguments = ["--model", "english-2m", "--adapter", "one", "two", "--task-folder", "tasks"]
    arguments += ["--tasks", "mmlu_six", "--limit", "5", "--output", "out"]
    assert keylayers("eval", *arguments) == 0
    shown = capsys.readouterr().out
    group, *subjects = evaluation_of(Path("out")).measures
    assert (group.task, group.metric, group.num_documents) == ("mmlu_six", "acc", 6 * 5)
    assert group.chance == pytest.approx(0.25)
    assert [one.task for one in subjects] == list(group.members)
    assert len(subjects) == 6
    for result in group.results:
        own = [each.value for one in subjects for each in one.results if each.model == result.model]
        assert result.value == pytest.approx(sum(own) / 6)
        assert result.interval.low <= 0.25
    blocks = shown.split("mmlu_six, acc")[1].split("anatomy, acc")[0]
    assert blocks.count("chance") == 4  # what it is, and of each model that it is not above it
    assert "no model is above chance, so there is nothing to compare: mmlu_six" in shown
    assert "better" not in shown.replace("lower is better", "")


def test_the_arms_of_the_real_study_have_their_sizes_and_rates(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "real")
    from arms import RATES, TIERS, Arm, next_rate

    parts = ("attn.q", "attn.o", "mlp.up", "mlp.down")
    names = [f"{block}.{part}" for block in range(10) for part in parts]
    ranked = [RankedModule(name, 0, "x", 1, float(99 - at)) for at, name in enumerate(names)]
    made_by = {"options": {"lora_rank": 16}, "model": {"num_head_parameters": 1}}
    to_retrain = {name: float(at) for at, name in enumerate(names)}  # the other way round
    for arm in (arm for tier in TIERS for arm in tier):
        found = [arm.modules(tuple(ranked), seed, made_by, to_retrain) for seed in (0, 0, 1)]
        assert found[0] == found[1] == sorted(found[0], key=names.index)
        assert (found[0] != found[2]) == (arm.order in ("random", "mlp"))
        if arm.order != "time":
            assert len(set(found[0])) == round(arm.size * len(names))
    first, last = names[:4], names[-4:]
    for order, expected in {"best": first, "first": first, "worst": last, "retrain": last}.items():
        assert Arm(order, 0.1).modules(ranked, 0, None, to_retrain) == expected
    for best in RATES[1:-1]:  # a loss with one lowest point is followed down to it, and no further
        tried = {}
        while (rate := next_rate(tried)) is not None:
            tried[rate] = abs(RATES.index(rate) - RATES.index(best))
        assert {0, 1} <= {*tried.values()}
        assert len(tried) <= 3 + abs(RATES.index(best) - RATES.index(1.0))
    assert next_rate({2.0: 1.0}, [4.0]) == 4.0
    assert next_rate({4.0: 1.0}, [4.0]) is None
