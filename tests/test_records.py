# SPDX-License-Identifier: Apache-2.0
import json

import pytest


def test_a_record_is_written_whole(tmp_path):
    from keylayers.records import write_json

    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [child.name for child in tmp_path.iterdir()] == ["record.json"]


def test_a_failed_write_keeps_what_was_there(tmp_path):
    from keylayers.records import write_json

    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["record.json"]


def test_the_environment_names_versions_and_no_variables(monkeypatch):
    from keylayers.records import environment

    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    record = environment()
    assert (record["num_processes"], record["wrapper"]) == (1, None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launched = environment()  # a part of what decides whether a run is the same
    assert (launched["num_processes"], launched["wrapper"]) == (8, "FSDP")
    assert set(record["libraries"]) >= {"torch", "transformers", "trl", "peft"}
    assert "hf_secret_of_a_test" not in json.dumps(record)
