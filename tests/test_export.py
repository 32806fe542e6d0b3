# SPDX-License-Identifier: Apache-2.0
"""Exports: what another tool makes of the files is exactly the selection, or there is no file.

One test builds and trains a model with torchtune itself. It lives apart from our own environment,
because PEFT refuses to work beside the release of torchao that it needs:
`pip install --no-deps --target FOLDER --requirement tests/torchtune.txt`, and TORCHTUNE=FOLDER.
"""

import json
import os
import random
import re
import subprocess
import sys
from itertools import product

import pytest
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model
from trl import ModelConfig, TrlParser, get_peft_config

from architectures import ARCHITECTURES
from commands import complaint, keylayers
from keylayers import export_selection
from keylayers.apply.trainable import train_only
from keylayers.errors import ConfigError
from keylayers.export import TOOLS
from keylayers.model.modules import map_modules
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.updates.adapter import tuner_layers
from merges import weight_by_rule

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    # the models of these tests have no name
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`:UserWarning"),
]
MODELS = {
    one.title: one
    for one in ARCHITECTURES
    if one.title in ("Llama", "GPT-2", "Mixtral", "Qwen3-MoE", "DeepSeek-V3")
}
SHARES = (0.1, 0.3, 0.75, 1.0)
REFUSED = "must express exactly the selection"


def ranking_of_model(title):
    draw = random.Random(0)
    modules = map_modules(MODELS[title].build())
    options = {"lora_rank": 2, "lora_alpha": 4, "tuned": "org/tuned"}
    made_by = {"model": {"name": "org/base: 'it'"}, "options": options}
    ranked = tuple(RankedModule.of(one, draw.random()) for one in modules)
    return Ranking(ranked, "random", provenance=made_by)


def lora(model, config):
    """Names of the modules that PEFT puts LoRA on."""
    return set(tuner_layers(get_peft_model(model, config)))


def trained_by(model):
    """Names of the parameters that are trained, without PEFT's additions."""
    trained = (name for name, one in model.named_parameters() if one.requires_grad)
    added = ("base_model.model.", ".modules_to_save.default")
    return {name.replace(added[0], "").replace(added[1], "") for name in trained}


def python(path):
    """What the file defines."""
    defined = {}
    exec(compile(path.read_text(), str(path), "exec"), defined)
    return defined


def content(folder, tool):
    return yaml.safe_load((folder / f"{tool}.yaml").read_text())


def by_peft_python(model, folder):
    return set(tuner_layers(python(folder / "selected.py")["selected_lora"](model)))


def by_trl(folder):
    """By TRL's own parser."""
    words = ["--config", str(folder / "trl.yaml")]
    (options,) = TrlParser([ModelConfig]).parse_args_and_config(words)
    assert options.model_name_or_path == "org/base: 'it'"
    return get_peft_config(options)


def by_axolotl(model, folder):
    """axolotl hands these on to PEFT under the names without `lora_`."""
    found = content(folder, "axolotl")
    assert (found["base_model"], found["adapter"]) == ("org/base: 'it'", "lora")
    names = ("r", "target_modules", "target_parameters")
    return lora(model, LoraConfig(**{name: found.get(f"lora_{name}") for name in names}))


def by_llamafactory(model, folder):
    found = content(folder, "llamafactory")
    assert isinstance(found["lora_target"], list)
    return lora(model, LoraConfig(r=found["lora_rank"], target_modules=found["lora_target"]))


def by_unsloth(loader_name):
    """Unsloth needs a GPU; it hands its `target_modules` on, in the form that each loader takes."""

    def trained(model, folder):
        def get_peft_model_(model, target_modules, **options):
            assert isinstance(target_modules, list) == (loader_name == "FastLanguageModel")
            return get_peft_model(model, LoraConfig(target_modules=target_modules, **options))

        loader = type(loader_name, (), {"get_peft_model": staticmethod(get_peft_model_)})
        made = python(folder / "selected_unsloth.py")["selected_lora"](loader, model)
        return set(tuner_layers(made))

    return trained


OF_TORCHTUNE = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def by_torchtune(model, folder):
    found = content(folder, "torchtune")["model"]
    assert (found["lora_rank"], found["lora_alpha"]) == (2, 4)
    keep = [name.replace("attn.", "self_attn.").rpartition(".") for name in found["keep"]]
    kinds, dense = {own for _, _, own in keep}, {"w1", "w2", "w3"}
    assert found["apply_lora_to_mlp"] == bool(kinds & dense)  # LoRA at first only where needed
    assert set(found["lora_attn_modules"]) == (kinds - dense or {"q_proj"})
    return {f"model.{parent}.{OF_TORCHTUNE.get(own, own)}" for parent, _, own in keep}


def by_ms_swift(model, folder):
    expression = content(folder, "ms-swift")["target_regex"]
    return lora(model, LoraConfig(r=2, target_modules=expression))


def by_mergekit(model, folder):
    """By mergekit's rule, which tests/test_mergekit.py compares with its code."""
    base, tuned = content(folder, "mergekit")["models"]
    assert (base["model"], tuned["model"]) == ("org/base: 'it'", "org/tuned")
    weights = [
        [weight_by_rule(entry["parameters"]["weight"], name) for entry in (base, tuned)]
        for name in model.state_dict()
    ]
    assert all(sorted(pair) == [0, 1] for pair in weights)
    merged = {name for name, pair in zip(model.state_dict(), weights, strict=True) if pair[1]}
    modules = {name.rpartition(".")[0] for name in merged}
    train_only(model, sorted(modules))
    assert trained_by(model) == merged  # biases too, and nothing else of these modules
    return modules


def unfrozen_by_python(model, folder):
    return trained_by(python(folder / "selected.py")["train_only_selected"](model))


def unfrozen_by_axolotl(model, folder):
    """As its source has it: dots are escaped, and names matched from their start."""
    patterns = content(folder, "axolotl")["unfrozen_parameters"]
    patterns = [re.sub(r"\.(?!\+)", r"\.", one) for one in patterns]
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if any(re.match(one, name) for one in patterns)}


def unfrozen_by_ms_swift(model, folder):
    starts = tuple(content(folder, "ms-swift")["trainable_parameters"])
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


# tool, kind of fine-tune, what a model and the folder of an export train by the tool's own way
WAYS = [
    ("peft", "lora", lambda model, folder: lora(model, PeftConfig.from_pretrained(folder))),
    ("peft", "lora", by_peft_python),
    ("trl", "lora", lambda model, folder: lora(model, by_trl(folder))),
    ("axolotl", "lora", by_axolotl),
    ("llamafactory", "lora", by_llamafactory),
    ("ms-swift", "lora", by_ms_swift),
    ("torchtune", "lora", by_torchtune),
    ("unsloth", "lora", by_unsloth("FastLanguageModel")),
    ("unsloth", "lora", by_unsloth("FastModel")),
    ("mergekit", "lora", by_mergekit),
    ("peft", "full", unfrozen_by_python),
    ("trl", "full", lambda model, folder: trained_by(get_peft_model(model, by_trl(folder)))),
    ("axolotl", "full", unfrozen_by_axolotl),
    ("ms-swift", "full", unfrozen_by_ms_swift),
]


def anything(title, selection):
    return True


def no_mixture(title, selection):
    return not selection.is_of_mixture


def num_plain(selection):
    """Modules other than experts and dense feed-forwards, which PEFT rewrites in a mixture."""
    dense = ("gate_proj", "up_proj", "down_proj", ".gate")
    return sum(not m.is_stacked and not m.name.endswith(dense) for m in selection.modules)


# What a tool trains exactly, by architecture and selection; without a row it refuses the kind
TAKES = {
    ("peft", "lora"): anything,
    ("peft", "full"): anything,
    ("axolotl", "lora"): anything,
    ("axolotl", "full"): anything,
    ("trl", "lora"): lambda title, chosen: no_mixture(title, chosen) or num_plain(chosen) > 1,
    ("trl", "full"): no_mixture,
    ("llamafactory", "lora"): lambda title, chosen: (
        no_mixture(title, chosen) or num_plain(chosen) == len(chosen.modules)
    ),
    ("ms-swift", "lora"): no_mixture,
    ("ms-swift", "full"): no_mixture,
    ("torchtune", "lora"): lambda title, chosen: title == "Llama",
    ("unsloth", "lora"): no_mixture,
    ("mergekit", "lora"): no_mixture,
}
REFUSING = [(*way, None) for way in product(TOOLS, ("lora", "full")) if way not in TAKES]


def wanted(kind, title, selection):
    """Modules with LoRA, or parameters that a full fine-tune trains."""
    if kind == "lora":
        return set(selection.names)
    model = MODELS[title].build()
    train_only(model, selection.names)
    return trained_by(model)


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize(("tool", "kind", "trained"), WAYS + REFUSING)
def test_a_tool_trains_exactly_the_selection_or_is_refused(tool, kind, trained, title, tmp_path):
    ranking = ranking_of_model(title)
    for place, share in enumerate(SHARES):
        folder, selection = tmp_path / str(place), ranking.select(share)
        if trained is None or not TAKES[tool, kind](title, selection):
            with pytest.raises(ConfigError, match=f"`to` {tool} {REFUSED}"):
                export_selection(ranking, share, tool, folder, kind=kind)
            assert not folder.exists()
            continue
        export_selection(ranking, share, tool, folder, kind=kind)
        assert trained(MODELS[title].build(), folder) == wanted(kind, title, selection)


def test_every_tool_is_tried():
    assert {(tool, kind) for tool, kind, _ in WAYS} == set(TAKES)
    assert {tool for tool, _ in TAKES} == set(TOOLS)


FOLDER = os.environ.get("TORCHTUNE")
TRAINED = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.models.convert_weights import tune_to_peft_adapter_weights
from torchtune.modules.peft import get_adapter_params, get_adapter_state_dict, set_trainable_params

settings = OmegaConf.load(sys.argv[2] + "/torchtune.yaml")
settings.model.base_component = "torchtune.models.llama3.lora_llama3"
size = dict(
    vocab_size=32, num_layers=int(sys.argv[3]), num_heads=4, num_kv_heads=2, embed_dim=32,
    max_seq_len=16, intermediate_dim=48,
)
torch.manual_seed(0)
model = config.instantiate(settings.model, **size)
set_trainable_params(model, get_adapter_params(model))
before = {name: one.detach().clone() for name, one in model.named_parameters()}
optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0)
tokens = torch.randint(32, (2, 16))
for _ in range(3):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
changed = {name for name, one in model.named_parameters() if (one != before[name]).any()}
adapter = get_adapter_state_dict(model.state_dict())
assert changed == set(adapter)
peft = tune_to_peft_adapter_weights(adapter, num_heads=4, num_kv_heads=2, dim=32, head_dim=8)
print(json.dumps(sorted(peft)))
"""


@pytest.mark.long
@pytest.mark.skipif(not FOLDER, reason="TORCHTUNE is not set; this file says how to install it")
@pytest.mark.parametrize("share", SHARES)
def test_torchtune_trains_exactly_the_selection(share, tmp_path):
    """By torchtune's own map of names to PEFT's, of what its own recipe would save."""
    ranking = ranking_of_model("Llama")
    export_selection(ranking, share, "torchtune", tmp_path)
    num_blocks = len({one.block_index for one in ranking.modules})
    command = [sys.executable, "-W", "ignore", "-c", TRAINED, FOLDER, tmp_path, str(num_blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in found}
    assert names == set(ranking.select(share).names)


def test_the_command_writes_what_it_says(ranked, tmp_path, capsys):
    options = ("--to", "peft", "--budget", "0.3", "--output", tmp_path / "e")
    assert keylayers("export", ranked, *options) == 0
    out = capsys.readouterr().out
    files = sorted((tmp_path / "e").iterdir())
    assert [one.name for one in files] == ["adapter_config.json", "selected.py"]
    assert all(one.name in out for one in files)
    assert json.loads(files[0].read_text())["r"] == 4  # as stage 1 of the ranking
    assert keylayers("export", ranked, *options) == 0  # the same once more
    files[1].write_text("mine")
    assert keylayers("export", ranked, *options) == 2
    assert "is there with other contents" in complaint(capsys)
    assert files[1].read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "peft"], "exactly one of `budget`"),
        (["--to", "word", "--budget", "0.3"], "peft"),
        (["--to", "peft", "--budget", "12GiB"], "needs a measured training step"),
        (["--to", "unsloth", "--budget", "0.3", "--update", "full"], "no full fine-tune"),
    ],
)
def test_what_cannot_be_exported_is_one_line(ranked, tmp_path, capsys, options, message):
    assert keylayers("export", ranked, *options, "--output", tmp_path / "e") == 2
    assert message in complaint(capsys)
    assert not (tmp_path / "e").exists()
