# SPDX-License-Identifier: Apache-2.0
"""Odd, huge and secret YAML, links in circles, adapters that claim to be huge: one line, soon."""

import json
import shutil
import struct

import pytest
import yaml

from commands import keylayers
from damage import begin, run
from keylayers.errors import ConfigError
from keylayers.yaml_values import yaml_value

# Each entry of the last list expands to a billion values.
LISTS = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30)
)
REFUSED = [
    (LISTS, "must be smaller, with aliases written out"),
    (MERGES, "must be valid YAML, but is not: its merges must be smaller"),
    ("a: &a {b: [*a]}", "must hold texts, .* alone, but: Circular reference"),
    ("a: .nan", "but: Out of range float values are not JSON compliant.*; put a text in quotes"),
    ("a: 2026-01-01", "but: Object of type date is not JSON serializable; put a text in quotes"),
    ("a: !!binary aGk=", "but: Object of type bytes"),
    ("a: !!set {1, 2}", "but: Object of type set"),
    ("a: {b: 1, b: 2}", "the key 'b' appears twice in one mapping"),
    ("a: !!map [x]", "must be valid YAML, but is not: a .*:map must be a mapping"),
    ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("a: [", "must be valid YAML"),
    ("[" * 2000, "must be valid YAML"),
    (f"a: {'1' * 5000}", "must be valid YAML"),
    ("a: !!bool abc", "must be valid YAML"),
    ("a: !!int ''", "must be valid YAML"),
    ("a: !!int '-'", "must be valid YAML"),
    ("a: !!float ''", "must be valid YAML"),
    ("a: !!timestamp abc", "must be valid YAML"),
    ("a: !!set [x]", "must be valid YAML"),
    ("a: {b: ['https://me:hunter2@host/m']}", "it must hold no password"),
    ("'https://me:hunter2@host/m': 1", "it must hold no password"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_yaml_that_is_not_plain_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        yaml_value(text, "it")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_values_of_yaml_anchors_and_merges_are_read():
    text = "a: &a {b: 1, c: [2.5, x, null, true]}\nd: {<<: *a, b: 4}\ne: *a"
    held = {"b": 1, "c": [2.5, "x", None, True]}
    assert yaml_value(text, "it") == {"a": held, "d": held | {"b": 4}, "e": held}
    assert yaml_value("", "it") is None


@pytest.fixture(scope="module", autouse=True)
def imported(tiny):
    """What the commands import, so that the time of each is its own."""
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    begin("rank", *inputs, "--adapter", tiny / "nowhere")
    begin("study", tiny / "nowhere.yaml", "--dry-run")


def test_yaml_that_is_larger_than_it_looks_is_one_line_and_soon(tmp_path):
    (tmp_path / "study.yaml").write_text(LISTS)
    assert run("study", tmp_path / "study.yaml", "--dry-run") == 2


def test_a_study_of_data_with_links_in_a_circle_is_planned(tiny, tmp_path):
    """A folder that a link inside leads back to, with a link to itself."""
    circle, path = tmp_path / "circle", tmp_path / "study.yaml"
    (circle / "deep").mkdir(parents=True)
    (circle / "deep" / "up").symlink_to(circle)
    (circle / "self.jsonl").symlink_to(circle / "self.jsonl")
    path.write_text(
        yaml.safe_dump({"options": {"model": str(tiny / "model"), "data": str(circle)}})
    )
    assert run("study", path, "--dry-run", "--output", tmp_path / "out") == 0
    assert run("study", path, "--dry-run", "--output", circle / "self.jsonl") == 0
    for words in ((path, "--output", circle / "self.jsonl"), (circle / "self.jsonl",), (circle,)):
        assert run("study", *words) == 2


def weights_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


CLAIM = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
WRAPPED = {"dtype": "F32", "shape": [2**62, 4, 2**3], "data_offsets": [0, 0]}
NAME = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
HUGE = {  # files that claim more than there is, or very much of little
    "terabytes": weights_file({NAME.format(0): CLAIM}),
    "a header of exabytes": struct.pack("<Q", 2**62) + b"{}",
    "a header that is not there": struct.pack("<Q", 10**8),
    "a size that wraps around": weights_file({NAME.format(0): WRAPPED}),
    "thousands of tensors": weights_file({NAME.format(n): EMPTY for n in range(20_000)}),
    "a deep header": weights_file(b'{"a":' * 50_000),
    "a name twice": weights_file(b'{"a":%s,"a":%s}' % ((json.dumps(EMPTY).encode(),) * 2)),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("content", HUGE.values(), ids=HUGE)
def test_an_adapter_that_claims_to_be_huge_is_one_line(tiny, tmp_path, content):
    folder = shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--adapter", folder)
    assert run("rank", *inputs, "--output", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


ADDRESS = "https://somebody:hunter2@host.example/x"
WITH_PASSWORD = [
    ("study", "secret.yaml", "--dry-run"),
    ("rank", "--model", ADDRESS, "--data", "d"),
    ("rank", "--model", "m", "--data", ADDRESS),
    ("rank", "--config", "run.yaml"),
    ("train", f"--ranking={ADDRESS}"),
    ("study", "study.yaml", "--ray-address", "ray://somebody:hunter2@127.0.0.1:10001"),
    ("study", "study.yaml", "--set", f"model={ADDRESS}"),
]


@pytest.mark.parametrize("words", WITH_PASSWORD, ids=" ".join)
def test_a_password_in_an_address_is_refused_and_not_repeated(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text("options: {model: m, data: d}")
    options = {"model": "m", "data": ADDRESS}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    (tmp_path / "secret.yaml").write_text(yaml.safe_dump({"options": options}))
    before = set(tmp_path.rglob("*"))
    assert keylayers(*words) == 2
    told = "".join(capsys.readouterr())
    assert "must hold no password" in told
    assert "hunter2" not in told
    assert set(tmp_path.rglob("*")) == before
