# SPDX-License-Identifier: Apache-2.0
"""YAML that is larger than it looks, links in circles, and adapters that claim to be huge."""

import json
import re
import struct

import pytest
import yaml

from commands import keylayers
from damage import begin, run


def bomb(where):
    """A few hundred bytes that stand for a thousand million values."""
    lines = ["a0: &a0 [0, 1, 2, 3, 4, 5, 6, 7, 8]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return where.format("\n  ".join(lines)).encode()


@pytest.fixture(scope="module", autouse=True)
def imported(tiny):
    """What the commands import, so that the time of each is its own."""
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    begin("rank", *inputs, "--adapter", tiny / "nowhere")
    begin("study", tiny / "nowhere.yaml", "--dry-run")


# What a YAML file holds -> what is said.
ODD_YAML = [
    (bomb("options:\n  model: m\n  data: d\n  {}"), "must be smaller, with aliases written out"),
    (b"options: {model: 'https://me:hunter2@host/m', data: d}", "must hold no password"),
]


@pytest.mark.parametrize(("content", "message"), ODD_YAML)
def test_odd_yaml_is_one_line_and_soon(tmp_path, capsys, content, message):
    from keylayers.cli import main

    path = tmp_path / "study.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("study", path, "--dry-run") == 2
    assert main(["study", str(path), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told)
    assert "hunter2" not in told


@pytest.fixture
def circle(tmp_path):
    """A folder that a link inside leads back to, and a link to itself."""
    folder = tmp_path / "circle"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    return folder


def test_links_in_a_circle_end_in_a_line(tiny, circle, tmp_path):
    """As data, model, adapter, ranking, output and study, and what the output holds."""
    model, data = ("--model", tiny / "model"), ("--data", tiny / "data.jsonl")
    loop = circle / "self.jsonl"
    out = ("--output", tmp_path / "out")
    for words in (
        ("rank", *model, "--data", circle, *out),
        ("rank", *model, "--data", loop, *out),
        ("rank", "--model", loop, *data, *out),
        ("rank", "--model", circle, *data, *out),
        ("rank", *model, *data, "--adapter", circle, *out),
        ("rank", *model, *data, "--adapter", loop, *out),
        ("rank", *model, *data, "--tuned", loop, *out),
        ("rank", *model, *data, "--output", loop),
        ("rank", *model, *data, "--config", loop, *out),
        ("train", "--ranking", loop, *out),
        ("verify", "--ranking", circle),
        ("prune", "--ranking", loop, *out),
        ("study", loop, *out),
        ("study", circle, *out),
    ):
        assert run(*words) == 2, words
    assert not (tmp_path / "out").exists()


def test_a_study_of_data_with_links_in_a_circle_is_planned(tiny, circle, tmp_path):
    content = {"options": {"model": str(tiny / "model"), "data": str(circle)}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    assert run("study", path, "--dry-run", "--output", tmp_path / "out") == 0
    path.write_text(yaml.safe_dump(content | {"options": content["options"] | {"model": "m"}}))
    assert run("study", path, "--dry-run", "--output", circle / "self.jsonl") == 0
    assert run("study", path, "--output", circle / "self.jsonl") == 2


def huge_adapters():
    """Headers of safetensors that claim more than there is, or very much of little."""

    def file(header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    claim = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    wrapped = {"dtype": "F32", "shape": [2**62, 4, 2**3], "data_offsets": [0, 0]}
    return {
        "terabytes": file({name.format(0): claim}),
        "a header of exabytes": struct.pack("<Q", 2**62) + b"{}",
        "a header that is not there": struct.pack("<Q", 10**8),
        "a size that wraps around": file({name.format(0): wrapped}),
        "thousands of tensors": file({name.format(n): empty for n in range(20_000)}),
        "a deep header": file(b'{"a":' * 50_000),
        "a name twice": file(b'{"a":%s,"a":%s}' % ((json.dumps(empty).encode(),) * 2)),
    }


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", huge_adapters())
def test_an_adapter_that_claims_to_be_huge_is_one_line(tiny, tmp_path, name):
    import shutil

    folder = tmp_path / "adapter"
    shutil.copytree(tiny / "adapter", folder)
    (folder / "adapter_model.safetensors").write_bytes(huge_adapters()[name])
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--adapter", folder)
    assert run("rank", *inputs, "--output", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


ADDRESS = "https://somebody:hunter2@host.example/x"
WITH_PASSWORD = [
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
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "m", "data": ADDRESS}))
    before = set(tmp_path.rglob("*"))
    assert keylayers(*words) == 2
    told = "".join(capsys.readouterr())
    assert "must hold no password" in told
    assert "hunter2" not in told
    assert set(tmp_path.rglob("*")) == before
