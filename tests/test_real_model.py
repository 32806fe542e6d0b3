# SPDX-License-Identifier: Apache-2.0
"""On a small pre-trained model and real data; skipped where they are absent."""

import json

import pytest

from commands import PLAIN_PEFT, fresh_process, keylayers

SHORT = ["--max-length", "64", "--max-examples", "200"]


@pytest.mark.long
def test_ranking_and_training_on_real_data(shared, tmp_path, capsys):
    model, data = shared / "models/english-2m", shared / "data/sft/alpaca_gpt4_999.json"
    options = ("--model", model, "--data", data, "--output", tmp_path / "out", *SHORT)
    assert keylayers("rank", *options, "--max-steps", "30", "--mask-batches", "2") == 0
    content = json.loads((tmp_path / "out" / "ranking.json").read_text())
    assert len(content["modules"]) == 56
    assert content["provenance"]["data"]["format"] == "alpaca"
    losses = content["provenance"]["held_out_loss_nats"]
    assert losses["tuned"] < losses["base"]
    options = ("--ranking", tmp_path / "out" / "ranking.json", "--budget", "0.3")
    assert keylayers("train", *options, "--output", tmp_path / "best") == 0
    best = {module["name"] for module in content["modules"] if module["rank"] <= 17}
    assert len(best) == 17
    assert set(fresh_process(PLAIN_PEFT, tmp_path / "best")) == best
    rows = json.loads((tmp_path / "best" / "keylayers.json").read_text())["results"]
    assert [row["label"] for row in rows] == [
        "base model",
        "selected",
        "all (stage 1 of the ranking)",
    ]
    assert rows[1]["held_out_loss_nats"] < rows[0]["held_out_loss_nats"]
