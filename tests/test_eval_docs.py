# SPDX-License-Identifier: Apache-2.0
"""What recipes/mmlu says is done as it is printed: MMLU as a task folder."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from commands import keylayers
from eval_files import evaluation_of
from tiny_files import add_noise

DOCS = (Path(__file__).resolve().parents[1] / "recipes" / "mmlu" / "README.md").read_text()
NUM_DOCUMENTS = 5  # of each subject


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def mmlu(shared, tmp_path_factory):
    """A folder with the small real model, two adapters of it, and the task folder of the docs."""
    place = tmp_path_factory.mktemp("mmlu")
    with zipfile.ZipFile(shared / "data" / "bench" / "mmlu.zip") as file:
        file.extractall(place)
    (place / "data").rename(place / "mmlu")
    (place / "tasks").mkdir()
    (place / "tasks" / "mmlu.template").write_text(block("yaml"))
    subprocess.run(["bash", "-c", block("bash")], cwd=place, check=True)
    (place / "english-2m").symlink_to(shared / "models" / "english-2m")
    torch.manual_seed(0)
    for name in ("one", "two"):
        model = AutoModelForCausalLM.from_pretrained(place / "english-2m", dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        add_noise(tuned, 0.02, "lora_B")
        tuned.save_pretrained(place / name)
    return place


def test_two_adapters_on_six_subjects_of_mmlu_are_near_chance_and_the_table_says_so(
    mmlu, monkeypatch, capsys
):
    monkeypatch.chdir(mmlu)
    arguments = ["--model", "english-2m", "--adapter", "one", "two", "--task-folder", "tasks"]
    arguments += ["--tasks", "mmlu_six", "--limit", str(NUM_DOCUMENTS), "--output", "out"]
    assert keylayers("eval", *arguments) == 0
    shown = capsys.readouterr().out
    group, *subjects = evaluation_of(Path("out")).measures
    assert (group.task, group.metric) == ("mmlu_six", "acc")
    assert group.num_documents == 6 * NUM_DOCUMENTS
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
