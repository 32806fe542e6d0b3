# SPDX-License-Identifier: Apache-2.0
"""YAML that is larger than it looks, links in circles, and adapters that claim to be huge."""

import json
import shutil
import struct

import pytest
import yaml

from commands import keylayers
from damage import begin, run


def bomb(where):
    """A few hundred bytes that stand for a thousand million values."""
    lines = ["a0: &a0 [0, 1, 2, 3, 4, 5, 6, 7, 8]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return where.format("\n  ".join(lines))


@pytest.fixture(scope="module", autouse=True)
def imported(tiny):
    """What the commands import, so that the time of each is its own."""
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    begin("rank", *inputs, "--adapter", tiny / "nowhere")
    begin("study", tiny / "nowhere.yaml", "--dry-run")


def test_yaml_that_is_larger_than_it_looks_is_one_line_and_soon(tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(bomb("options:\n  model: m\n  data: d\n  {}"))
    assert keylayers("study", path, "--dry-run") == 2
    assert "must be smaller, with aliases written out" in capsys.readouterr().err
    assert run("study", path, "--dry-run") == 2


@pytest.fixture
def circle(tmp_path):
    """A folder that a link inside leads back to, and a link to itself."""
    folder = tmp_path / "circle"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    return folder


def test_a_study_of_data_with_links_in_a_circle_is_planned(tiny, circle, tmp_path):
    content = {"options": {"model": str(tiny / "model"), "data": str(circle)}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run("study", path, "--dry-run", "--output", tmp_path / "out") == 0
    path.write_text(yaml.safe_dump(content | {"options": content["options"] | {"model": "m"}}))
    assert run("study", path, "--dry-run", "--output", circle / "self.jsonl") == 0
    for words in ((path, "--output", circle / "self.jsonl"), (circle / "self.jsonl",), (circle,)):
        assert run("study", *words) == 2


def weights_file(header, data=b""):
    """A safetensors file."""
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
