# SPDX-License-Identifier: Apache-2.0
"""Bad input gives one clear line, exit code 2, no traceback, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import QUICK, complaint, complaint_in, keylayers, listing, rank
from keylayers.trainers.loss import TrainerLoss
from tiny_files import write_partial_adapter

LONG = "".join(
    json.dumps({"prompt": f"{index} {'Why? ' * 60}", "completion": "Because."}) + "\n"
    for index in range(8)
)
QUESTIONS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
)
FILES = {
    "empty.jsonl": "",
    "columns.jsonl": '{"frage": "Was?", "antwort": "Das."}\n',
    "long.jsonl": LONG,
    "broken.json": '[{"prompt": "a", ',
    "nothing.jinja": "{# renders nothing #}",
    "no_answer.jinja": QUESTIONS,
    "broken.jinja": "{% for m in messages %}",
    "typo.yaml": "mask_stps: 3\n",
    "list.yaml": "- model\n",
    "value.yaml": "warmup_steps: many\n",
}


def with_modules(change):
    return lambda content: content | {"modules": change(content["modules"])}


# File -> how it differs from a sound ranking
RANKINGS = {
    "renamed": with_modules(
        lambda modules: [one | {"name": one["name"].replace("mlp", "ffn")} for one in modules]
    ),
    "few": with_modules(lambda modules: [one for one in modules if one["rank"] <= 12]),
    "resized": with_modules(lambda modules: [modules[0] | {"num_parameters": 1}, *modules[1:]]),
    "no_options": lambda content: content | {"provenance": {}},
    "no_stage_1": lambda content: (
        content | {"provenance": content["provenance"] | {"stage_1": None}}
    ),
}


@pytest.fixture(scope="module")
def here(tiny, ranked, tmp_path_factory):
    """Broken files next to good ones, and a ranking in `own` next to damaged versions of it."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).write_text(content)
    (folder / "no_model").mkdir()
    (folder / "circle" / "deep").mkdir(parents=True)
    (folder / "circle" / "deep" / "up").symlink_to(folder / "circle")
    (folder / "circle" / "loop.jsonl").symlink_to(folder / "circle" / "loop.jsonl")
    write_partial_adapter(tiny, folder / "fewer", ["q_proj", "v_proj"])
    write_broken_models(tiny, folder)
    shutil.copytree(ranked, folder / "own")
    text = (folder / "own" / "ranking.json").read_text()
    (folder / "own" / "half.json").write_text(text[: len(text) // 2])
    for name, change in RANKINGS.items():
        (folder / "own" / f"{name}.json").write_text(json.dumps(change(json.loads(text))))
    (folder / "alone.json").write_text(text)
    return folder


def write_broken_models(tiny, folder):
    """Code that comes with a model, weights in a pickle, and weights of which one is missing."""
    for source, name, weights, pickle in (
        ("adapter", "pickled", "adapter_model.safetensors", "adapter_model.bin"),
        ("model", "pickled_model", "model.safetensors", "pytorch_model.bin"),
    ):
        shutil.copytree(tiny / source, folder / name)
        (folder / name / weights).unlink()
        torch.save({}, folder / name / pickle)
    evil, lacking = (shutil.copytree(tiny / "model", folder / n) for n in ("evil", "lacking"))
    config = json.loads((evil / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    weights = load_file(lacking / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})


LOOP = "{here}/circle/loop.jsonl"  # a link to itself; another link leads back to `circle`
# Command -> options that differ from good ones, and what is said of them
CASES = {
    "rank": [
        ({"adapter": "{tiny}/adapter", "max-steps": "6"}, "left out with `adapter`: nothing is"),
        ({"adapter": "{tiny}/adapter", "stage-1": "{here}/own"}, "`stage_1` must be left out with"),
        ({"tuned": "{tiny}/tuned", "lora-rank": "4"}, "`lora_rank` must be left out with `tuned`"),
        ({"model": "{here}/nowhere"}, "there is no such folder"),
        ({"model": "{here}/no_model"}, "the folder holds no config.json"),
        ({"model": "x" * 300}, "begins with 'xxxxxxxxxx"),
        ({"model": "{here}/empty.jsonl"}, "but it is a file"),
        ({"model": "{here}/evil"}, "must be a causal language model"),  # its code writes a file
        ({"model": "{here}/pickled_model"}, "safetensors"),
        ({"model": "{here}/lacking"}, "lacks 1, first model.layers.1.mlp.up_proj.weight"),
        ({"data": "{here}/nowhere.jsonl"}, "must be a file, a folder or a hub data set"),
        ({"data": "{here}/empty.jsonl"}, "must have rows, got none"),
        ({"data": "{here}/broken.json"}, "must be readable as a table"),
        ({"data": "{here}/columns.jsonl"}, "antwort"),
        ({"data": "{here}/long.jsonl"}, "leave room for an answer in 64 tokens"),
        ({"chat-template": "{here}/nothing.jinja"}, "nothing"),
        ({"chat-template": "{here}/no_answer.jinja"}, "answer"),
        ({"chat-template": "{here}/broken.jinja"}, "broken.jinja"),
        ({"chat-template": "chatmll"}, "did you mean 'chatml'"),
        ({"config": "{here}/typo.yaml"}, "'mask_stps', did you mean 'mask_steps'?"),
        ({"config": "{here}/list.yaml"}, "must map options to values, got a list"),
        ({"config": "{here}/value.yaml"}, "many"),
        ({"mask-stps": "3"}, "--mask-steps"),
        ({"mask-optimizer": "lion"}, "sgd"),
        ({"learning-rate": "0"}, "`learning_rate` must be above 0"),
        ({"learning-rate": "inf"}, "`learning_rate` must be above 0 and finite"),
        ({"mask-seed": "99999999999"}, "`mask_seed` must be from 0 to 4294967295"),
        ({"seed": "-1"}, "`seed` must be from 0 to 4294967295, got -1"),
        ({"adapter": "{tiny}/adapter", "tuned": "{tiny}/tuned"}, "got both"),
        ({"adapter": "{here}/no_model"}, "holds no adapter_config.json"),
        ({"adapter": "{here}/pickled"}, "must hold adapter_model.safetensors"),
        ({"model": "{tiny}/wide", "adapter": "{tiny}/adapter"}, "for this base model"),
        ({"model": "{tiny}/wide", "tuned": "{tiny}/tuned"}, "must have the same shapes"),
        ({"tuned": "{tiny}/model"}, "must differ from the base"),
        ({"learning-rate": "1e30"}, "at training step"),
        ({"output": "{here}/typo.yaml/out"}, "can be written"),
        ({"data": "{here}/circle"}, "Data files must be of one type"),
        ({"data": LOOP}, "which is none of them"),
        ({"model": LOOP}, "must be a model, but there is no such folder"),
        ({"model": "{here}/circle"}, "the folder holds no config.json"),
        ({"adapter": "{here}/circle"}, "holds no adapter_config.json"),
        ({"adapter": LOOP}, "must be a PEFT adapter, but there is no such folder"),
        ({"tuned": LOOP}, "must be a model, but there is no such folder"),
        ({"output": LOOP}, "can be written"),
        ({"config": LOOP}, "Too many levels of symbolic links"),
    ],
    "train": [
        ({"budget": "0"}, "`budget` as a count must be at least 1"),
        ({"budget": "0.0"}, "above 0 and at most 1, got 0.0"),
        ({"budget": "1.5"}, "above 0 and at most 1, got 1.5"),
        ({"budget": "abc"}, "got 'abc'"),
        ({"budget": None}, "got none"),
        ({"freeze": "0.25"}, "got budget and freeze"),
        ({"ranking": "{here}/own/half.json"}, "damaged or cut off"),
        ({"ranking": "{here}/own/none.json"}, "must exist"),
        ({"budget": "auto"}, "make it with `keylayers verify`"),
        ({"model": "{tiny}/wide"}, "first model.layers.0.self_attn.q_proj (1,024 par"),
        ({"update": "full", "dtype": "bfloat16"}, "`dtype` must be left out"),
        ({"controls": "middle"}, "random"),
        ({"ranking": None, "model": "m", "data": "d"}, "exactly one of `ranking` (a file) and"),
        ({"action": "remove"}, "`action` must be left out without"),
        ({"output": "{tiny}"}, "holds other files"),
        ({"ranking": LOOP}, "Too many levels of symbolic links"),
        ({"window": "3"}, "`window` must be left out without `rank_first`"),
        ({"method": "ila"}, "`method` must be left out without `rank_first`"),
    ],
    "train --rank-first": [
        ({"ranking": "{tiny}"}, "must exist"),
        ({"budget": "0.3"}, "`budget` must be left out with `rank_first`, got 0.3"),
        ({"freeze": "1.5"}, "`freeze` must be above 0 and below 1, got 1.5"),
        ({"freeze": "0.01"}, "must be at least one of the adapter's 21 modules, got 0.01"),
        ({"update": "full"}, "`update` must be an adapter with `rank_first`, got full"),
        ({"controls": "worst"}, "must be of all, random, first and last, got worst"),
        ({"steps": "1"}, "`steps` must be at least 2 with `rank_first`"),
        ({"max-steps": "300"}, "must be below the run's 300 steps, got 300"),
        ({"method": "path", "price": "1"}, "`price` must be left out with `method` path"),
    ],
    "verify": [
        ({"ranking": "{here}/own/half.json"}, "damaged or cut off"),
        ({"ranking": "{here}/own/none.json"}, "must exist"),
        ({"model": "{tiny}/wide"}, "must be of this model, but 21 of 21 modules"),
        ({"tuned": "{tiny}/model"}, "must differ"),
        ({"adapter": "{here}/own/none"}, "none"),
        ({"points": "1"}, "`points` must be at least 2, got 1"),
        ({"random-orders": "0"}, "`random_orders` must be at least 1, got 0"),
        ({"eval-batch-size": "0"}, "`eval_batch_size` must be at least 1, got 0"),
        ({"margin": "1"}, "`margin` must be a share from 0 to below 1, got 1.0"),
        ({"margin": "-0.1"}, "`margin` must be a share from 0 to below 1"),
        ({"margin": "nan"}, "`margin` must be a share from 0"),
        ({"point": "3"}, "--points"),
        ({"budget": "0.3"}, "--budget"),
        ({"ranking": "{here}/alone.json"}, "give `adapter` or"),
        ({"ranking": "{here}/own/resized.json"}, "but 1 of 21 modules"),
        ({"ranking": "{here}/own/few.json"}, "must hold every module"),
        ({"adapter": "a", "tuned": "b"}, "got both"),
        ({"data": "{here}/gone.jsonl"}, "must be a file, a folder or"),
        ({"ranking": "{here}/circle"}, "the ranking file must exist"),
    ],
    "prune": [
        ({"ranking": LOOP}, "Too many levels of symbolic links"),
        ({"ranking": "{here}/own/renamed.json"}, "be of this model, but 9"),
        ({"ranking": "{here}/own/few.json"}, "of the update, but 9"),
        ({"adapter": "{here}/fewer"}, "but 15 of 21 are not"),
        ({"model": "{tiny}/wide"}, "the ranking must be of this model"),
        ({"budget": "0.001x-params"}, "must allow at least the best module"),
        ({"budget": "0"}, "`budget` as a count must be at least 1"),
        ({"freeze": "0.5"}, "got budget and freeze"),
        ({"adapter": "a", "tuned": "b"}, "got both"),
        ({"ranking": "{here}/own/no_options.json", "model": "m"}, "--data"),
        ({"ranking": "{here}/own/no_stage_1.json"}, "give `adapter` or `tuned`"),
        ({"data": "{here}/gone.jsonl"}, "must be a file, a folder or"),
        ({"tuned": "{tiny}/model"}, "must differ from the base"),
        ({"output": "{here}/typo.yaml"}, "the output must be a folder"),
        ({"output": "{tiny}"}, "holds other files"),
        ({"output": "{here}/own/adapter"}, "must lie apart from what"),
    ],
}


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [(command, *case) for command, cases in CASES.items() for case in cases],
    ids=lambda part: str(part)[:40],
)
def test_bad_input_is_one_line_and_writes_nothing(
    tiny, here, tmp_path, capsys, command, changes, message
):
    options = {"model": tiny / "model", "data": tiny / "data.jsonl"}
    if command in ("train", "verify", "prune"):
        options = {"ranking": here / "own"}
    if command in ("train", "prune"):
        options["budget"] = "0.3"
    if command != "verify":
        options["output"] = tmp_path / "deep" / "out"
    options |= {
        name: value and value.format(tiny=tiny, here=here) for name, value in changes.items()
    }
    given = [part for name, value in options.items() if value for part in (f"--{name}", value)]
    before = listing(here)
    capsys.readouterr()
    quick = QUICK if command == "rank" and not {"adapter", "tuned"} & set(changes) else ()
    assert keylayers(*command.split(), *given, *quick) == 2
    said = capsys.readouterr()
    assert message in complaint_in(said.err)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []
    assert listing(here) == before


def test_ctrl_c_leaves_no_half_written_file(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainerLoss, "backward", Mock(side_effect=KeyboardInterrupt))
    assert rank(tiny, tmp_path / "out", "--adapter", tiny / "adapter") == 130
    assert "nothing is half written" in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


TELEMETRY = """
import sys
import keylayers.training.run
import trl.trainer.base_trainer
import huggingface_hub.utils._telemetry as telemetry
assert not telemetry.constants.HF_HUB_OFFLINE
telemetry._TELEMETRY_QUEUE = type("Q", (), {"put": lambda self, x: sys.exit("SENT")})()
from keylayers.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_telemetry_is_sent(tiny, tmp_path):
    """With the hub online as far as the libraries know, every attempt to send would be seen."""
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", tmp_path / "o")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and name not in ("CI", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    }
    command = [sys.executable, "-W", "ignore", "-c", TELEMETRY, "rank", *map(str, options), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "SENT" not in done.stderr
