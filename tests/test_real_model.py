# SPDX-License-Identifier: Apache-2.0
"""On a small model, data and inputs that people really have; skipped where they are absent."""

import subprocess
import sys
from pathlib import Path

import pytest

from commands import PLAIN_PEFT, best, fresh_process, keylayers, read, record_of, with_path

pytestmark = pytest.mark.long


def test_ranking_and_training_on_real_data(shared, tmp_path):
    data = ("--data", shared / "data/sft/alpaca_gpt4_999.json")
    short = ("--max-length", 64, "--max-examples", 200, "--max-steps", 30, "--mask-batches", 2)
    options = ("--model", shared / "models/english-2m", *data, *short)
    assert keylayers("rank", *options, "--output", tmp_path / "out") == 0
    content, made_by = read(tmp_path / "out"), read(tmp_path / "out")["provenance"]
    assert len(content["modules"]) == 56
    assert made_by["data"]["format"] == "alpaca"
    assert made_by["held_out_loss_nats"]["tuned"] < made_by["held_out_loss_nats"]["base"]
    options = ("--ranking", tmp_path / "out" / "ranking.json", "--budget", 0.3)
    assert keylayers("train", *options, "--output", tmp_path / "best") == 0
    assert set(fresh_process(PLAIN_PEFT, tmp_path / "best")) == best(tmp_path / "out", 17)
    losses = {
        row["label"]: row["held_out_loss_nats"] for row in record_of(tmp_path / "best")["results"]
    }
    assert list(losses) == ["base model", "selected", "all (stage 1 of the ranking)"]
    assert losses["selected"] < losses["base model"]


def test_inputs_that_once_went_wrong_come_out_right(shared):
    run = shared / "cases" / "run"
    if not run.is_file():
        pytest.skip("needs ../shared/cases, which is not here")
    own = {"KL": str(Path(sys.executable).with_name("keylayers")), "PY": sys.executable}
    done = subprocess.run([run], capture_output=True, text=True, env=with_path(**own))
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == 0, "\n".join(wrong)
    assert wrong[-1].endswith("cases hold")
