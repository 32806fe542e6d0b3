# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one clear line, exit code 2, no traceback, and leaves nothing behind."""

import json
import os
import shutil
import subprocess

import pytest
import torch

import preloaded
from commands import QUICK, complaint, keylayers

LONG_QUESTION = "Why? " * 60
DATA_FILES = {
    "empty.jsonl": "",
    "columns.jsonl": json.dumps({"frage": "Was?", "antwort": "Das."}) + "\n",
    "long.jsonl": "".join(
        json.dumps({"prompt": f"{index} {LONG_QUESTION}", "completion": "Because."}) + "\n"
        for index in range(8)
    ),
    "broken.json": '[{"prompt": "a", ',
}
OTHER_FILES = {
    "nothing.jinja": "{# renders nothing #}",
    "no_answer.jinja": "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
    "{% endif %}{% endfor %}",
    "broken.jinja": "{% for m in messages %}",
    "typo.yaml": "mask_stps: 3\n",
    "list.yaml": "- model\n",
    "value.yaml": "warmup_steps: many\n",
}


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """Broken files beside the good ones."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in (DATA_FILES | OTHER_FILES).items():
        (folder / name).write_text(content)
    (folder / "no_model").mkdir()
    pickled = folder / "pickled"
    shutil.copytree(tiny / "adapter", pickled)
    weights = pickled / "adapter_model.safetensors"
    torch.save({}, pickled / "adapter_model.bin")
    weights.unlink()
    return folder


# what is wrong, arguments instead of the good ones, what the line says
RANK = [
    ("a missing model", {"model": "{files}/nowhere"}, "there is no such folder"),
    ("no model", {"model": "{files}/no_model"}, "the folder holds no config.json"),
    ("a name that no system takes", {"model": "x" * 300}, "begins with 'xxxxxxxxxx"),
    ("a file as model", {"model": "{files}/empty.jsonl"}, "but it is a file"),
    (
        "missing data",
        {"data": "{files}/nowhere.jsonl"},
        "must be a file, a folder or a hub data set",
    ),
    ("empty data", {"data": "{files}/empty.jsonl"}, "must have rows, got none"),
    ("broken data", {"data": "{files}/broken.json"}, "must be readable as a table"),
    ("unknown columns", {"data": "{files}/columns.jsonl"}, "antwort"),
    ("only long prompts", {"data": "{files}/long.jsonl"}, "leave room for an answer in 64 tokens"),
    ("an empty template", {"chat-template": "{files}/nothing.jinja"}, "nothing"),
    ("a template without answers", {"chat-template": "{files}/no_answer.jinja"}, "answer"),
    ("a broken template", {"chat-template": "{files}/broken.jinja"}, "broken.jinja"),
    ("an unknown template", {"chat-template": "chatmll"}, "did you mean 'chatml'"),
    (
        "a typo in the YAML",
        {"config": "{files}/typo.yaml"},
        "'mask_stps', did you mean 'mask_steps'?",
    ),
    ("a YAML list", {"config": "{files}/list.yaml"}, "must map options to values, got a list"),
    ("a bad YAML value", {"config": "{files}/value.yaml"}, "many"),
    ("an unknown option", {"mask-stps": "3"}, "--mask-steps"),
    ("a bad choice", {"mask-optimizer": "lion"}, "sgd"),
    ("a bad number", {"learning-rate": "0"}, "`learning_rate` must be above 0"),
    ("an infinite number", {"learning-rate": "inf"}, "`learning_rate` must be above 0 and finite"),
    ("a seed too large", {"mask-seed": "99999999999"}, "`mask_seed` must be from 0 to 4294967295"),
    ("a seed below 0", {"seed": "-1"}, "`seed` must be from 0 to 4294967295, got -1"),
    ("adapter and checkpoint", {"adapter": "{tiny}/adapter", "tuned": "{tiny}/tuned"}, "got both"),
    ("no adapter", {"adapter": "{files}/no_model"}, "holds no adapter_config.json"),
    ("a pickled adapter", {"adapter": "{files}/pickled"}, "must hold adapter_model.safetensors"),
    ("another base", {"model": "{tiny}/wide", "adapter": "{tiny}/adapter"}, "for this base model"),
    (
        "other shapes",
        {"model": "{tiny}/wide", "tuned": "{tiny}/tuned"},
        "must have the same shapes",
    ),
    ("equal checkpoints", {"tuned": "{tiny}/model"}, "must differ from the base"),
    ("a loss that explodes", {"learning-rate": "1e30"}, "at training step"),
    ("an output below a file", {"output": "{files}/typo.yaml/out"}, "can be written"),
]


@pytest.mark.parametrize(("changes", "message"), [c[1:] for c in RANK], ids=[c[0] for c in RANK])
def test_rank_refuses(tiny, files, tmp_path, capsys, changes, message):
    options = {
        "model": tiny / "model",
        "data": tiny / "data.jsonl",
        "output": tmp_path / "deep" / "out",
    } | {name: value.format(tiny=tiny, files=files) for name, value in changes.items()}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    before = sorted(files.rglob("*"))
    assert keylayers("rank", *arguments, *QUICK) == 2
    assert message in complaint(capsys)
    assert list(tmp_path.iterdir()) == []
    assert sorted(files.rglob("*")) == before


@pytest.fixture(scope="module")
def ranking(ranked, tmp_path_factory):
    output = tmp_path_factory.mktemp("bad") / "ranked"
    shutil.copytree(ranked, output)
    text = (output / "ranking.json").read_text()
    (output / "half.json").write_text(text[: len(text) // 2])
    return output


TRAIN = [
    ("a budget of 0", {"budget": "0"}, "must be at least 1, got 0"),
    ("a budget of 0.0", {"budget": "0.0"}, "above 0 and at most 1, got 0.0"),
    ("a budget above 1", {"budget": "1.5"}, "above 0 and at most 1, got 1.5"),
    ("a budget that is no number", {"budget": "abc"}, "got 'abc'"),
    ("no budget", {"budget": None}, "got neither"),
    ("budget and freeze", {"freeze": "0.25"}, "got both"),
    ("half a ranking", {"ranking": "{ranking}/half.json"}, "damaged or cut off"),
    ("no ranking", {"ranking": "{ranking}/none.json"}, "must exist"),
    ("auto without verify", {"budget": "auto"}, "make it with `keylayers verify`"),
    ("another model", {"model": "{tiny}/wide"}, "first model.layers.0.self_attn.q_proj (1,024 par"),
    ("a dtype with full", {"update": "full", "dtype": "bfloat16"}, "`dtype` must be left out"),
    ("an unknown control", {"controls": "middle"}, "random"),
]


@pytest.mark.parametrize(("changes", "message"), [c[1:] for c in TRAIN], ids=[c[0] for c in TRAIN])
def test_train_refuses(tiny, ranking, tmp_path, capsys, changes, message):
    options = {"ranking": str(ranking), "budget": "0.3", "output": str(tmp_path / "out")} | changes
    arguments = [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name}", value.format(tiny=tiny, ranking=ranking))
    ]
    capsys.readouterr()
    assert keylayers("train", *arguments) == 2
    assert message in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


VERIFY = [
    ("half a ranking", {"ranking": "{ranking}/half.json"}, "damaged or cut off"),
    ("no ranking", {"ranking": "{ranking}/none.json"}, "must exist"),
    ("another model", {"model": "{tiny}/wide"}, "must be of this model, but 21 of 21 modules"),
    ("the base as checkpoint", {"tuned": "{tiny}/model"}, "must differ"),
    ("no adapter", {"adapter": "{ranking}/none"}, "none"),
    ("one point", {"points": "1"}, "`points` must be at least 2, got 1"),
    ("no random order", {"random-orders": "0"}, "`random_orders` must be at least 1, got 0"),
    ("a batch of none", {"eval-batch-size": "0"}, "`eval_batch_size` must be at least 1, got 0"),
    ("a margin of all", {"margin": "1"}, "`margin` must be a share from 0 to below 1, got 1.0"),
    ("a margin below 0", {"margin": "-0.1"}, "`margin` must be a share from 0 to below 1"),
    ("a margin that is no number", {"margin": "nan"}, "`margin` must be a share from 0"),
    ("an unknown option", {"point": "3"}, "--points"),
    ("an option of train", {"budget": "0.3"}, "--budget"),
]


@pytest.mark.parametrize(
    ("changes", "message"), [c[1:] for c in VERIFY], ids=[c[0] for c in VERIFY]
)
def test_verify_refuses(tiny, ranking, capsys, changes, message):
    options = {"ranking": "{ranking}"} | changes
    arguments = [
        part
        for name, value in options.items()
        for part in (f"--{name}", value.format(tiny=tiny, ranking=ranking))
    ]
    before = sorted(ranking.rglob("*"))
    capsys.readouterr()
    assert keylayers("verify", *arguments) == 2
    assert message in complaint(capsys)
    assert sorted(ranking.rglob("*")) == before


def test_code_that_comes_with_a_model_is_not_run(tiny, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    arguments = ("--model", folder, "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    assert keylayers("rank", *arguments) == 2
    assert "keylayers: " in complaint(capsys)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_of_a_model_are_not_loaded(tiny, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    arguments = ("--model", folder, "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    assert keylayers("rank", *arguments) == 2
    assert "safetensors" in complaint(capsys)


def test_a_checkpoint_that_lacks_weights_is_refused(tiny, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--model", folder, "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    assert keylayers("rank", *arguments) == 2
    assert "lacks 1, first model.layers.1.mlp.up_proj.weight" in complaint(capsys)


def test_ctrl_c_leaves_no_half_written_file(tiny, tmp_path, capsys, monkeypatch):
    from keylayers.trainers.loss import TrainerLoss

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainerLoss, "backward", interrupted)
    arguments = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--adapter")
    output = ("--output", tmp_path / "out")
    assert keylayers("rank", *arguments, tiny / "adapter", *output, *QUICK) == 130
    assert "nothing is half written" in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


def test_no_telemetry_is_sent(tiny, tmp_path):
    """With the hub online as far as the libraries know, every attempt to send would be seen."""
    code = (
        "import sys, threading\n"
        "import keylayers.training.run\n"
        "import trl.trainer.base_trainer as base\n"
        "import huggingface_hub.utils._telemetry as telemetry\n"
        "telemetry._TELEMETRY_QUEUE = type('Q', (), {'put': lambda self, x: sys.exit('SENT')})()\n"
        "from keylayers.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", tmp_path / "o")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and name not in ("CI", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    }
    command = [preloaded.python(), "-W", "ignore", "-c", code, "rank", *map(str, options), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "SENT" not in done.stderr
