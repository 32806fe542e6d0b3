# SPDX-License-Identifier: Apache-2.0
"""Commands of keylayers as tests give them, what they leave, and plain libraries that read it."""

import contextlib
import io
import json
import os
import subprocess
import sys

import preloaded

QUICK_STAGE_1 = ["--max-steps", "6", "--lora-rank", "4"]
QUICK_STAGE_2 = ["--mask-batches", "2", "--batch-size", "4"]
QUICK = [*QUICK_STAGE_1, *QUICK_STAGE_2]
STEPS = ["--steps", "8", "--learning-rate", "0.05"]

EXPERTS_OF_PLAIN_PEFT = """
import sys
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora.layer import ParamWrapper
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
found = [each.parameter_name for each in model.modules() if isinstance(each, ParamWrapper)]
print(*sorted(found))
"""

PLAIN_PEFT = """
import sys
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
assert "keylayers" not in sys.modules
print(*model.targeted_module_names)
"""
PLAIN_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"]
print(model.dtype)
"""


def keylayers(*arguments):
    """The exit code of a command, in this process."""
    from keylayers.cli import main

    return main([str(argument) for argument in arguments])


def printed(*arguments):
    """The exit code of a command, and what it prints on both streams."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = keylayers(*arguments)
    return code, out.getvalue(), err.getvalue()


def rank(tiny, output, *more):
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", output)
    has_stage_1 = not {"--adapter", "--tuned"} & set(more)
    return keylayers("rank", *options, *(QUICK if has_stage_1 else QUICK_STAGE_2), *more)


def read(output):
    return json.loads((output / "ranking.json").read_text())


def scores(output):
    return [module["score"] for module in read(output)["modules"]]


def best(output, count):
    """Names of the best modules of a ranking."""
    return {module["name"] for module in read(output)["modules"] if module["rank"] <= count}


def complaint(capsys):
    """The one line on stderr that says what is wrong; notes before it are not part of it."""
    return complaint_in(capsys.readouterr().err)


def complaint_in(err):
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("keylayers: ")]
    assert errors == lines[-1:], lines
    assert not any("Traceback" in line for line in lines)
    return errors[0]


def fresh_process(code, *arguments):
    """What a process without keylayers prints."""
    command = [preloaded.python(), "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.check_output(command, text=True).split()


def with_path(**more):
    """The environment of a process that imports what this one does, with more in it."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, **more}


def file_for(preferences, objective):
    """The file of the fixture `preferences` that an objective needs."""
    return preferences / ("rated.jsonl" if objective == "kto" else "pairs.jsonl")


def everything_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_in(folder):
    """The tensors of an adapter or a checkpoint."""
    from safetensors.torch import load_file

    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def changed_weights(first, second):
    """Names of the tensors that differ between two checkpoints, which hold the same ones."""
    before, after = weights_in(first), weights_in(second)
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if bool((value != after[name]).any())}


def module_of(name):
    """The module that a tensor of an adapter belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def modules_in(folder):
    return {module_of(name) for name in weights_in(folder)}


def updated_modules(folder):
    """Modules of an adapter whose B is not zero."""
    tensors = weights_in(folder).items()
    return {module_of(name) for name, value in tensors if "lora_B" in name and bool(value.any())}


def record_of(folder):
    return json.loads((folder / "keylayers.json").read_text())


def verified_in(folder):
    return json.loads((folder / "verification.json").read_text(encoding="utf-8"))


def listing(folder):
    """Path -> time of its last change."""
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def plain_loss(tiny, model, adapter=None, off=()):
    """Held-out loss of a model, or of PEFT's own with LoRA's B set to zero in the modules `off`."""
    import torch

    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare
    from keylayers.evaluation.held_out import held_out_loss
    from keylayers.model.loading import load_adapter, load_model, load_tokenizer
    from keylayers.model.options import ModelOptions
    from keylayers.training.options import TrainingOptions
    from keylayers.training.run import make_trainer

    tokenizer = load_tokenizer(ModelOptions(model=str(tiny / "model")))
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    loaded = load_model(ModelOptions(model=str(model)))
    if adapter is not None:
        loaded = load_adapter(loaded, str(adapter))
    with torch.no_grad():
        for name in off:
            loaded.get_base_model().get_submodule(name).lora_B["default"].weight.zero_()
    training = TrainingOptions(batch_size=2)
    trainer = make_trainer(loaded, tokenizer, data.train, training, num_steps=1)
    return held_out_loss(trainer, data.held_out)
