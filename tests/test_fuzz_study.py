# SPDX-License-Identifier: Apache-2.0
"""Generated damage to study files, YAML that is larger than it looks, and links in circles."""

import json
import re
import struct
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from damage import LARGE, LONGEST_SECONDS, begin, cases, changed, damaged_text, run
from test_fuzz_inputs import YAML

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings(LARGE)]
STUDY = {
    "options": {
        **{
            "model": "mistralai/Mistral-7B-v0.1",
            "data": "GAIR/lima",
            "max_steps": 3,
            "epsilon": 0.1,
        },
        **{"points": 5, "random_orders": 2, "train_max_length": 64, "controls": ["random"]},
    },
    "grid": {
        "seed": [0, 1],
        "method": ["ila", {"name": "path", "method": "path", "path_points": 2}],
        "budget": [0.3, "1.0x-params", "0.5x-time", "auto", {"freeze": 0.25}],
    },
    "verify": True,
    "compare": [0.3],
    "evaluate": {"tasks": ["mmlu"], "limit": 3},
}
NAME = re.compile(r"(stage-1|ranking|verification|training|evaluation)-[0-9a-f]{12}")
OUT = Path("out")


def bomb(where):
    """A few hundred bytes that stand for a thousand million values."""
    lines = ["a0: &a0 [0, 1, 2, 3, 4, 5, 6, 7, 8]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return where.format("\n  ".join(lines)).encode()


study_files = st.one_of(
    changed(STUDY)
    .filter(lambda one: isinstance(one, dict) and len(str(one)) < 4000)
    .filter(lambda one: "\ud800" not in str(one))
    .map(lambda one: yaml.safe_dump(one).encode()),
    damaged_text(yaml.safe_dump(STUDY)),
    st.sampled_from(YAML).map(str.encode),
)


@pytest.fixture(scope="module", autouse=True)
def imported(tiny):
    """What the commands import, so that the time of each is its own."""
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    begin("rank", *inputs, "--adapter", tiny / "nowhere")
    begin("study", tiny / "nowhere.yaml", "--dry-run")


def test_a_damaged_study_file_is_refused_or_a_plan(tmp_path, monkeypatch):
    from keylayers.commands.config import read_yaml
    from keylayers.commands.study.files import plan_files
    from keylayers.errors import ConfigError

    monkeypatch.setattr("keylayers.commands.study.plan.environment", dict)
    path = tmp_path / "s.yaml"
    found = []  # of each accepted file, how many cells

    @cases(1000)
    @given(study_files)
    def check(content):
        path.write_bytes(content)
        start = time.process_time()
        try:
            (planned,) = plan_files({path: read_yaml(path, "study")}, OUT)
        except ConfigError:
            return
        finally:
            assert time.process_time() - start < LONGEST_SECONDS
        for cell in planned.cells:
            assert NAME.fullmatch(cell.name)
            assert json.dumps(cell.commands, allow_nan=False)
        found.append(len(planned.cells))

    check()
    assert max(found) > 1  # some were sound


def test_a_damaged_study_file_is_one_line_or_shown(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("study")
    monkeypatch.chdir(folder)
    words = ("study", "study.yaml", "--dry-run", "--output", "out")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))

    @cases(100)
    @given(study_files)
    def check(content):
        (folder / "study.yaml").write_bytes(content)
        run(*words)
        assert [one.name for one in folder.iterdir()] == ["study.yaml"]

    check()


# What a YAML file holds -> what is said.
ODD_YAML = [
    (bomb("options:\n  model: m\n  data: d\n  {}"), "must be smaller, with aliases written out"),
    (b"options: {model: 'https://me:hunter2@host/m', data: d}", "must hold no password"),
    (
        f"options: {{model: m, data: d}}\ngrid: {{seed: {[*range(200)]}, steps: {[*range(200)]}}}",
        "must have at most 10,000 combinations, but that of .* has 40,000",
    ),
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
