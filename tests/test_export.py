# SPDX-License-Identifier: Apache-2.0
"""Exports: what another tool makes of the files is exactly the selection, or there is no file."""

import json
import random
import re

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
REFUSED = "must be able to train exactly the selection"


def ranking_of_model(title):
    draw = random.Random(0)
    modules = map_modules(MODELS[title].build())
    made_by = {"model": {"name": "org/base: 'it'"}, "options": {"lora_rank": 2, "lora_alpha": 4}}
    ranked = tuple(RankedModule.of(one, draw.random()) for one in modules)
    return Ranking(ranked, "random", provenance=made_by)


def lora(model, config):
    """Names of the modules that PEFT puts LoRA on."""
    return set(tuner_layers(get_peft_model(model, config)))


def python(path):
    """What the file defines."""
    defined = {}
    exec(compile(path.read_text(), str(path), "exec"), defined)
    return defined


def content(folder, tool):
    return yaml.safe_load((folder / f"{tool}.yaml").read_text())


def trl_options(folder):
    """By TRL's own parser."""
    (options,) = TrlParser([ModelConfig]).parse_args_and_config(
        ["--config", str(folder / "trl.yaml")]
    )
    assert options.model_name_or_path == "org/base: 'it'"
    return options


def by_peft(model, folder):
    return lora(model, PeftConfig.from_pretrained(folder))


def by_peft_python(model, folder):
    return set(tuner_layers(python(folder / "selected.py")["selected_lora"](model)))


def by_trl(model, folder):
    return lora(model, get_peft_config(trl_options(folder)))


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


def by_ms_swift(model, folder):
    expression = content(folder, "ms-swift")["target_regex"]
    return lora(model, LoraConfig(r=2, target_modules=expression))


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


WAYS = [
    ("peft", by_peft),
    ("peft", by_peft_python),
    ("trl", by_trl),
    ("axolotl", by_axolotl),
    ("llamafactory", by_llamafactory),
    ("ms-swift", by_ms_swift),
    ("unsloth", by_unsloth("FastLanguageModel")),
    ("unsloth", by_unsloth("FastModel")),
]


def test_every_tool_is_tried():
    assert {tool for tool, _ in WAYS} | {"torchtune"} == set(TOOLS)  # tests/test_torchtune.py


def is_refused(tool, selection):
    """Of a mixture of experts."""
    if tool in ("ms-swift", "unsloth"):
        return True
    dense = ("gate_proj", "up_proj", "down_proj", ".gate")
    plain = [m for m in selection.modules if not m.is_stacked and not m.name.endswith(dense)]
    if tool == "llamafactory":
        return len(plain) < len(selection.modules)
    return tool == "trl" and len(plain) < 2


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize(("tool", "trained"), WAYS)
def test_lora_is_on_exactly_the_selection_or_the_tool_is_refused(tool, trained, title, tmp_path):
    ranking = ranking_of_model(title)
    is_mixture = any(one.is_stacked for one in ranking.modules)
    num_exported = 0
    for place, share in enumerate(SHARES):
        folder = tmp_path / str(place)
        if is_mixture and is_refused(tool, ranking.select(share)):
            with pytest.raises(ConfigError, match=f"`to` {tool} {REFUSED}"):
                export_selection(ranking, share, tool, folder)
            assert not folder.exists()
            continue
        export_selection(ranking, share, tool, folder)
        num_exported += 1
        assert trained(MODELS[title].build(), folder) == set(ranking.select(share).names)
    if tool in ("peft", "axolotl") or not is_mixture:
        assert num_exported == len(SHARES)
    assert num_exported > 0 or tool != "trl"


def unfrozen_by_python(model, folder):
    made = python(folder / "selected.py")["train_only_selected"](model)
    return {name for name, one in made.named_parameters() if one.requires_grad}


def unfrozen_by_axolotl(model, folder):
    """As its source has it: dots are escaped, and names matched from their start."""
    patterns = content(folder, "axolotl")["unfrozen_parameters"]
    patterns = [re.sub(r"\.(?!\+)", r"\.", one) for one in patterns]
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if any(re.match(one, name) for one in patterns)}


def unfrozen_by_ms_swift(model, folder):
    starts = tuple(content(folder, "ms-swift")["trainable_parameters"])
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def unfrozen_by_trl(model, folder):
    tuned = get_peft_model(model, get_peft_config(trl_options(folder)))
    trained = (name for name, one in tuned.named_parameters() if one.requires_grad)
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        for name in trained
    }


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize(
    ("tool", "unfrozen"),
    [
        ("peft", unfrozen_by_python),
        ("axolotl", unfrozen_by_axolotl),
        ("ms-swift", unfrozen_by_ms_swift),
        ("trl", unfrozen_by_trl),
        ("llamafactory", None),
        ("torchtune", None),
        ("unsloth", None),
    ],
)
def test_a_full_fine_tune_is_of_exactly_the_selection_or_refused(tool, unfrozen, title, tmp_path):
    ranking = ranking_of_model(title)
    is_mixture = any(one.is_stacked for one in ranking.modules)
    for place, share in enumerate(SHARES):
        folder = tmp_path / str(place)
        if unfrozen is None or (is_mixture and tool in ("ms-swift", "trl")):
            with pytest.raises(ConfigError, match=f"`to` {tool} {REFUSED}"):
                export_selection(ranking, share, tool, folder, kind="full")
            assert not folder.exists()
            continue
        export_selection(ranking, share, tool, folder, kind="full")
        model = MODELS[title].build()
        train_only(model, ranking.select(share).names)
        wanted = {name for name, one in model.named_parameters() if one.requires_grad}
        assert unfrozen(MODELS[title].build(), folder) == wanted


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
