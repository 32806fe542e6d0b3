# SPDX-License-Identifier: Apache-2.0
import json

from keylayers.environment import environment


def test_the_environment_names_versions_and_no_variables(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    record = environment()
    assert (record["num_processes"], record["wrapper"]) == (1, None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launched = environment()  # it decides whether two runs are the same
    assert (launched["num_processes"], launched["wrapper"]) == (8, "FSDP")
    assert set(record["libraries"]) >= {"torch", "transformers", "trl", "peft"}
    assert "hf_secret_of_a_test" not in json.dumps(record)
