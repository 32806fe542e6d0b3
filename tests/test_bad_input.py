# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one clear line, exit code 2, no traceback, and leaves nothing behind."""

import json
import os
import shutil
import subprocess

import pytest
import torch

import preloaded
from commands import QUICK, complaint, complaint_in, keylayers, listing
from tiny_files import write_partial_adapter

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


def _renamed(content):
    for module in content["modules"]:
        module["name"] = module["name"].replace("mlp", "ffn")


def _few(content):
    content["modules"] = [module for module in content["modules"] if module["rank"] <= 12]


def _resized(content):
    content["modules"][0]["num_parameters"] += 1


def _no_options(content):
    content["provenance"] = {}


def _no_stage_1(content):
    del content["provenance"]["stage_1"]


@pytest.fixture(scope="module")
def here(tiny, ranked, tmp_path_factory):
    """Broken files next to good ones, and a ranking in `own` next to damaged versions of it."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in (DATA_FILES | OTHER_FILES).items():
        (folder / name).write_text(content)
    (folder / "no_model").mkdir()
    shutil.copytree(tiny / "adapter", folder / "pickled")
    torch.save({}, folder / "pickled" / "adapter_model.bin")
    (folder / "pickled" / "adapter_model.safetensors").unlink()
    write_partial_adapter(tiny, folder / "fewer", ["q_proj", "v_proj"])
    shutil.copytree(ranked, folder / "own")
    text = (folder / "own" / "ranking.json").read_text()
    (folder / "own" / "half.json").write_text(text[: len(text) // 2])
    for change in (_renamed, _few, _resized, _no_options, _no_stage_1):
        content = json.loads(text)
        change(content)
        (folder / "own" / f"{change.__name__[1:]}.json").write_text(json.dumps(content))
    (folder / "alone.json").write_text(text)
    return folder


# command, what is wrong, options that differ from the good ones, what the line says
CASES = [
    ("rank", "a missing model", {"model": "{here}/nowhere"}, "there is no such folder"),
    ("rank", "no model", {"model": "{here}/no_model"}, "the folder holds no config.json"),
    ("rank", "a name that no system takes", {"model": "x" * 300}, "begins with 'xxxxxxxxxx"),
    ("rank", "a file as model", {"model": "{here}/empty.jsonl"}, "but it is a file"),
    (
        "rank",
        "missing data",
        {"data": "{here}/nowhere.jsonl"},
        "must be a file, a folder or a hub data set",
    ),
    ("rank", "empty data", {"data": "{here}/empty.jsonl"}, "must have rows, got none"),
    ("rank", "broken data", {"data": "{here}/broken.json"}, "must be readable as a table"),
    ("rank", "unknown columns", {"data": "{here}/columns.jsonl"}, "antwort"),
    (
        "rank",
        "only long prompts",
        {"data": "{here}/long.jsonl"},
        "leave room for an answer in 64 tokens",
    ),
    ("rank", "an empty template", {"chat-template": "{here}/nothing.jinja"}, "nothing"),
    ("rank", "a template without answers", {"chat-template": "{here}/no_answer.jinja"}, "answer"),
    ("rank", "a broken template", {"chat-template": "{here}/broken.jinja"}, "broken.jinja"),
    ("rank", "an unknown template", {"chat-template": "chatmll"}, "did you mean 'chatml'"),
    (
        "rank",
        "a typo in the YAML",
        {"config": "{here}/typo.yaml"},
        "'mask_stps', did you mean 'mask_steps'?",
    ),
    (
        "rank",
        "a YAML list",
        {"config": "{here}/list.yaml"},
        "must map options to values, got a list",
    ),
    ("rank", "a bad YAML value", {"config": "{here}/value.yaml"}, "many"),
    ("rank", "an unknown option", {"mask-stps": "3"}, "--mask-steps"),
    ("rank", "a bad choice", {"mask-optimizer": "lion"}, "sgd"),
    ("rank", "a bad number", {"learning-rate": "0"}, "`learning_rate` must be above 0"),
    (
        "rank",
        "an infinite number",
        {"learning-rate": "inf"},
        "`learning_rate` must be above 0 and finite",
    ),
    (
        "rank",
        "a seed too large",
        {"mask-seed": "99999999999"},
        "`mask_seed` must be from 0 to 4294967295",
    ),
    ("rank", "a seed below 0", {"seed": "-1"}, "`seed` must be from 0 to 4294967295, got -1"),
    (
        "rank",
        "adapter and checkpoint",
        {"adapter": "{tiny}/adapter", "tuned": "{tiny}/tuned"},
        "got both",
    ),
    ("rank", "no adapter", {"adapter": "{here}/no_model"}, "holds no adapter_config.json"),
    (
        "rank",
        "a pickled adapter",
        {"adapter": "{here}/pickled"},
        "must hold adapter_model.safetensors",
    ),
    (
        "rank",
        "another base",
        {"model": "{tiny}/wide", "adapter": "{tiny}/adapter"},
        "for this base model",
    ),
    (
        "rank",
        "other shapes",
        {"model": "{tiny}/wide", "tuned": "{tiny}/tuned"},
        "must have the same shapes",
    ),
    ("rank", "equal checkpoints", {"tuned": "{tiny}/model"}, "must differ from the base"),
    ("rank", "a loss that explodes", {"learning-rate": "1e30"}, "at training step"),
    ("rank", "an output below a file", {"output": "{here}/typo.yaml/out"}, "can be written"),
    ("train", "a budget of 0", {"budget": "0"}, "must be at least 1, got 0"),
    ("train", "a budget of 0.0", {"budget": "0.0"}, "above 0 and at most 1, got 0.0"),
    ("train", "a budget above 1", {"budget": "1.5"}, "above 0 and at most 1, got 1.5"),
    ("train", "a budget that is no number", {"budget": "abc"}, "got 'abc'"),
    ("train", "no budget", {"budget": None}, "got neither"),
    ("train", "budget and freeze", {"freeze": "0.25"}, "got both"),
    ("train", "half a ranking", {"ranking": "{here}/own/half.json"}, "damaged or cut off"),
    ("train", "no ranking", {"ranking": "{here}/own/none.json"}, "must exist"),
    ("train", "auto without verify", {"budget": "auto"}, "make it with `keylayers verify`"),
    (
        "train",
        "another model",
        {"model": "{tiny}/wide"},
        "first model.layers.0.self_attn.q_proj (1,024 par",
    ),
    (
        "train",
        "a dtype with full",
        {"update": "full", "dtype": "bfloat16"},
        "`dtype` must be left out",
    ),
    ("train", "an unknown control", {"controls": "middle"}, "random"),
    ("verify", "half a ranking", {"ranking": "{here}/own/half.json"}, "damaged or cut off"),
    ("verify", "no ranking", {"ranking": "{here}/own/none.json"}, "must exist"),
    (
        "verify",
        "another model",
        {"model": "{tiny}/wide"},
        "must be of this model, but 21 of 21 modules",
    ),
    ("verify", "the base as checkpoint", {"tuned": "{tiny}/model"}, "must differ"),
    ("verify", "no adapter", {"adapter": "{here}/own/none"}, "none"),
    ("verify", "one point", {"points": "1"}, "`points` must be at least 2, got 1"),
    (
        "verify",
        "no random order",
        {"random-orders": "0"},
        "`random_orders` must be at least 1, got 0",
    ),
    (
        "verify",
        "a batch of none",
        {"eval-batch-size": "0"},
        "`eval_batch_size` must be at least 1, got 0",
    ),
    (
        "verify",
        "a margin of all",
        {"margin": "1"},
        "`margin` must be a share from 0 to below 1, got 1.0",
    ),
    (
        "verify",
        "a margin below 0",
        {"margin": "-0.1"},
        "`margin` must be a share from 0 to below 1",
    ),
    ("verify", "a margin that is no number", {"margin": "nan"}, "`margin` must be a share from 0"),
    ("verify", "an unknown option", {"point": "3"}, "--points"),
    ("verify", "an option of train", {"budget": "0.3"}, "--budget"),
    ("verify", "no adapter of its own", {"ranking": "{here}/alone.json"}, "give `adapter` or"),
    ("verify", "other sizes", {"ranking": "{here}/own/resized.json"}, "but 1 of 21 modules"),
    ("verify", "an unranked update", {"ranking": "{here}/own/few.json"}, "must hold every module"),
    ("verify", "adapter and checkpoint", {"adapter": "a", "tuned": "b"}, "got both"),
    ("verify", "missing data", {"data": "{here}/gone.jsonl"}, "must be a file, a folder or"),
    ("prune", "other names", {"ranking": "{here}/own/renamed.json"}, "be of this model, but 9"),
    ("prune", "an unranked update", {"ranking": "{here}/own/few.json"}, "of the update, but 9"),
    ("prune", "an adapter on fewer modules", {"adapter": "{here}/fewer"}, "but 15 of 21 are not"),
    ("prune", "another model", {"model": "{tiny}/wide"}, "the ranking must be of this model"),
    ("prune", "none kept", {"budget": "0.001x-params"}, "must allow at least the best module"),
    ("prune", "a budget of 0", {"budget": "0"}, "`budget` as a count must be at least 1"),
    ("prune", "budget and freeze", {"freeze": "0.5"}, "got both"),
    ("prune", "adapter and checkpoint", {"adapter": "a", "tuned": "b"}, "got both"),
    ("prune", "no data", {"ranking": "{here}/own/no_options.json", "model": "m"}, "--data"),
    ("prune", "no update", {"ranking": "{here}/own/no_stage_1.json"}, "give `adapter` or `tuned`"),
    ("prune", "data that are gone", {"data": "{here}/gone.jsonl"}, "must be a file, a folder or"),
    ("prune", "the same checkpoint", {"tuned": "{tiny}/model"}, "must differ from the base"),
    ("prune", "a file as output", {"output": "{here}/typo.yaml"}, "the output must be a folder"),
    ("prune", "other files there", {"output": "{tiny}"}, "holds other files"),
    ("prune", "its source as output", {"output": "{here}/own/adapter"}, "must lie apart from what"),
]


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [(command, *case) for command, _, *case in CASES],
    ids=[f"{command}: {what}" for command, what, *_ in CASES],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tiny, here, tmp_path, capsys, command, changes, message
):
    output = tmp_path / "deep" / "out"
    options = {"ranking": here / "own", "budget": "0.3", "output": output}
    if command == "rank":
        options = {"model": tiny / "model", "data": tiny / "data.jsonl", "output": output}
    elif command == "verify":
        options = {"ranking": here / "own"}
    options |= {
        name: value and value.format(tiny=tiny, here=here) for name, value in changes.items()
    }
    given = [part for name, value in options.items() if value for part in (f"--{name}", value)]
    before = listing(here)
    capsys.readouterr()
    assert keylayers(command, *given, *(QUICK if command == "rank" else ())) == 2
    said = capsys.readouterr()
    assert message in complaint_in(said.err)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []
    assert listing(here) == before


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
