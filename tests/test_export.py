# SPDX-License-Identifier: Apache-2.0
"""Exports: what another tool makes of the files is exactly the selection, or there is no file."""

import json
import random
import re

import pytest
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model

from architectures import ARCHITECTURES
from commands import complaint, keylayers

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


def ranking_of_model(model, seed=0):
    from keylayers.model.modules import map_modules
    from keylayers.ranking.ranked_module import RankedModule
    from keylayers.ranking.ranking import Ranking

    draw = random.Random(seed)
    modules = tuple(RankedModule.of(one, draw.random()) for one in map_modules(model))
    made_by = {"model": {"name": "org/base: 'it'"}, "options": {"lora_rank": 2, "lora_alpha": 4}}
    return Ranking(modules, "random", provenance=made_by)


def lora(model, config):
    """Names of the modules that PEFT puts LoRA on."""
    from keylayers.updates.adapter import tuner_layers

    return set(tuner_layers(get_peft_model(model, config)))


def python(path):
    """What the file defines."""
    defined = {}
    exec(compile(path.read_text(), str(path), "exec"), defined)
    return defined


def by_peft(model, folder):
    return lora(model, PeftConfig.from_pretrained(folder))


def by_peft_python(model, folder):
    from keylayers.updates.adapter import tuner_layers

    return set(tuner_layers(python(folder / "selected.py")["selected_lora"](model)))


def by_trl(model, folder):
    """TRL's own parser and its own PEFT config."""
    from trl import ModelConfig, TrlParser, get_peft_config

    parser = TrlParser([ModelConfig])
    (options,) = parser.parse_args_and_config(["--config", str(folder / "trl.yaml")])
    assert options.model_name_or_path == "org/base: 'it'"
    return lora(model, get_peft_config(options))


def by_axolotl(model, folder):
    """axolotl hands these on to PEFT under the names without `lora_`."""
    content = yaml.safe_load((folder / "axolotl.yaml").read_text())
    assert (content["base_model"], content["adapter"]) == ("org/base: 'it'", "lora")
    handed = {name: content.get(f"lora_{name}") for name in ("r", "target_modules")}
    parameters = content.get("lora_target_parameters")
    return lora(model, LoraConfig(**handed, target_parameters=parameters))


def by_llamafactory(model, folder):
    content = yaml.safe_load((folder / "llamafactory.yaml").read_text())
    assert isinstance(content["lora_target"], list)
    return lora(model, LoraConfig(r=content["lora_rank"], target_modules=content["lora_target"]))


def by_ms_swift(model, folder):
    content = yaml.safe_load((folder / "ms-swift.yaml").read_text())
    return lora(model, LoraConfig(r=2, target_modules=content["target_regex"]))


def by_unsloth(loader_name):
    """Unsloth needs a GPU; it hands its `target_modules` on, in the form that each loader takes."""

    def trained(model, folder):
        from keylayers.updates.adapter import tuner_layers

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
    from keylayers.export import TOOLS

    assert {tool for tool, _ in WAYS} | {"torchtune"} == set(TOOLS)  # tests/test_torchtune.py


def is_refused(tool, selection):
    """Of a mixture of experts."""
    if tool in ("ms-swift", "unsloth"):
        return True
    dense = ("gate_proj", "up_proj", "down_proj")
    plain = [
        one
        for one in selection.modules
        if not one.is_stacked and not one.name.endswith((*dense, ".gate"))
    ]
    if tool == "llamafactory":
        return len(plain) < len(selection.modules)
    return tool == "trl" and len(plain) < 2


@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize(("tool", "trained"), WAYS)
def test_lora_is_on_exactly_the_selection_or_the_tool_is_refused(tool, trained, title, tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    ranking = ranking_of_model(MODELS[title].build())
    is_mixture = any(one.is_stacked for one in ranking.modules)
    num_exported = 0
    for place, share in enumerate(SHARES):
        folder = tmp_path / str(place)
        if is_mixture and is_refused(tool, ranking.select(share)):
            with pytest.raises(ConfigError, match=f"`to` {tool} must be able to train exactly the"):
                keylayers.export_selection(ranking, share, tool, folder)
            assert not folder.exists()
            continue
        keylayers.export_selection(ranking, share, tool, folder)
        num_exported += 1
        assert trained(MODELS[title].build(), folder) == set(ranking.select(share).names)
    if tool in ("peft", "axolotl") or not is_mixture:
        assert num_exported == len(SHARES)
    assert num_exported > 0 or tool not in ("peft", "axolotl", "trl")


def unfrozen_by_axolotl(model, folder):
    """As its source has it: dots are escaped, and names matched from their start."""
    patterns = yaml.safe_load((folder / "axolotl.yaml").read_text())["unfrozen_parameters"]
    patterns = [re.sub(r"\.(?!\+)", r"\.", one) for one in patterns]
    names = (name for name, _ in model.named_parameters())
    return {name for name in names if any(re.match(one, name) for one in patterns)}


def unfrozen_by_ms_swift(model, folder):
    starts = yaml.safe_load((folder / "ms-swift.yaml").read_text())["trainable_parameters"]
    return {name for name, _ in model.named_parameters() if name.startswith(tuple(starts))}


def unfrozen_by_python(model, folder):
    made = python(folder / "selected.py")["train_only_selected"](model)
    return {name for name, one in made.named_parameters() if one.requires_grad}


def unfrozen_by_trl(model, folder):
    from trl import ModelConfig, TrlParser, get_peft_config

    parser = TrlParser([ModelConfig])
    (options,) = parser.parse_args_and_config(["--config", str(folder / "trl.yaml")])
    tuned = get_peft_model(model, get_peft_config(options))
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
    ],
)
def test_a_full_fine_tune_is_of_exactly_the_selection(tool, unfrozen, title, tmp_path):
    import keylayers
    from keylayers.apply.trainable import train_only
    from keylayers.errors import ConfigError

    ranking = ranking_of_model(MODELS[title].build())
    is_mixture = any(one.is_stacked for one in ranking.modules)
    for place, share in enumerate(SHARES):
        folder = tmp_path / str(place)
        if is_mixture and tool in ("ms-swift", "trl"):
            with pytest.raises(ConfigError, match="must be able to train exactly the selection"):
                keylayers.export_selection(ranking, share, tool, folder, kind="full")
            continue
        keylayers.export_selection(ranking, share, tool, folder, kind="full")
        model = MODELS[title].build()
        train_only(model, ranking.select(share).names)
        wanted = {name for name, one in model.named_parameters() if one.requires_grad}
        assert unfrozen(MODELS[title].build(), folder) == wanted


@pytest.mark.parametrize("tool", ["llamafactory", "unsloth"])
def test_a_full_fine_tune_that_a_tool_has_not_is_refused(tool, tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    ranking = ranking_of_model(MODELS["Llama"].build())
    with pytest.raises(ConfigError, match=f"`to` {tool} must be able to train exactly"):
        keylayers.export_selection(ranking, 0.3, tool, tmp_path, kind="full")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_what_it_says(ranked, tmp_path, capsys):
    options = ("--budget", "0.3", "--output", tmp_path / "e")
    assert keylayers("export", ranked, "--to", "peft", *options) == 0
    out = capsys.readouterr().out
    files = sorted((tmp_path / "e").iterdir())
    assert [one.name for one in files] == ["adapter_config.json", "selected.py"]
    assert all(one.name in out for one in files)
    assert json.loads(files[0].read_text())["r"] == 4  # as stage 1 of the ranking
    assert keylayers("export", ranked, "--to", "peft", *options) == 0  # the same once more
    files[1].write_text("mine")
    assert keylayers("export", ranked, "--to", "peft", *options) == 2
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
