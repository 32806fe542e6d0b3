# SPDX-License-Identifier: Apache-2.0
"""`keylayers targets` says what PEFT and other trainers really train: equality of sets."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from architectures import ARCHITECTURES, changed_modules, trainer_of

BUILT = {one.title: one for one in ARCHITECTURES}
LANGUAGE = "model.language_model.layers."
AXOLOTL = {"base_model": "base", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
FACTORY = {"model_name_or_path": "base", "stage": "sft"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the configs of one model of each kind, without weights."""
    folder = tmp_path_factory.mktemp("models")
    for title in ("Llama", "Mixtral", "Qwen3-MoE", "LLaVA", "GPT-2"):
        model = BUILT[title].build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / title)
    return folder


def shown(tmp_path, capsys, models, title, config, *options):
    """What the command prints as JSON."""
    from keylayers.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["targets", str(path), "--model", str(models / title), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def named(found):
    """Every module that the command says is trained, and how many parameters in all."""
    rows = {row["name"]: row for row in found["modules"]} | found["outside"]
    is_hit = lambda row: row["lora_rank"] is not None or row["num_trained_weights"]  # noqa: E731
    return {name for name, row in rows.items() if is_hit(row)}, found["num_trained_parameters"]


def trained(model, architecture):
    """What training with real weights changes, and how many parameters it trains."""
    count = sum(one.numel() for one in model.parameters() if one.requires_grad)
    saved = {
        name.split(".modules_to_save.")[0]
        for name, one in getattr(model, "get_base_model", lambda: model)().named_parameters()
        if one.requires_grad and ".modules_to_save." in name
    }
    found = changed_modules(trainer_of(model, architecture))
    return {name.removesuffix(".weight").removesuffix(".bias") for name in found} | saved, count


def linear(model):
    """Last names of all linear layers but the head."""
    names = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    return {name.rpartition(".")[2] for name in names} - {"lm_head"}


def lora(**options):
    return lambda model: get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def only(is_trained):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        return model

    return freeze


# config, model, how the tool's own way is done by hand
CASES = {
    "peft-list": ({"r": 4, "target_modules": ["q_proj", "v_proj"]}, "Llama", None),
    "peft-regex": ({"r": 4, "target_modules": r".*\.1\.mlp\.(up|down)_proj"}, "Llama", None),
    "peft-all-linear": ({"r": 4, "target_modules": "all-linear"}, "Llama", None),
    "peft-layers": (
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        "Llama",
        None,
    ),
    "peft-excluded-dora-ranks": (
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "exclude_modules": ["model.layers.0.self_attn.q_proj"],
            "use_dora": True,
            "rank_pattern": {"k_proj": 2},
        },
        "Llama",
        None,
    ),
    "peft-conv1d": ({"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "GPT-2", None),
    "peft-mixture-regex": (
        {"r": 4, "target_modules": r"model\.layers\.1\.self_attn\.o_proj"},
        "Mixtral",
        None,
    ),
    "peft-mixture-dense-name": (
        {"r": 4, "target_modules": ["model.layers.0.mlp.down_proj"]},
        "Qwen3-MoE",
        None,
    ),
    "peft-experts": (
        {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        "Mixtral",
        None,
    ),
    "peft-vision": ({"r": 4, "target_modules": ["q_proj", "fc1"]}, "LLaVA", None),
    "trl-list": (
        {"use_peft": True, "lora_target_modules": ["q_proj", "up_proj"], "learning_rate": 1e-4},
        "Llama",
        lora(r=16, target_modules=["q_proj", "up_proj"]),
    ),
    "trl-saved": (
        {
            "use_peft": True,
            "lora_r": 8,
            "lora_target_modules": "dummy-target-modules",
            "lora_modules_to_save": ["model.layers.1.mlp.up_proj"],
        },
        "Llama",
        lora(target_modules="dummy-target-modules", modules_to_save=["model.layers.1.mlp.up_proj"]),
    ),
    "axolotl-linear": (
        AXOLOTL | {"adapter": "lora", "lora_target_linear": True, "lora_target_modules": ["x"]},
        "Llama",
        lambda model: lora(r=4, target_modules=linear(model))(model),
    ),
    "axolotl-mixture": (
        AXOLOTL | {"adapter": "qlora", "lora_target_modules": ["o_proj", "w1", "w2", "w3"]},
        "Mixtral",
        lora(r=4, target_modules=["o_proj", "w1", "w2", "w3"]),
    ),
    "axolotl-unfrozen": (
        {
            "base_model": "base",
            "unfrozen_parameters": [
                "^lm_head.weight$[:32]",
                "model.layers.1.self_attn.q_proj",
                "model.layers.[0-9]+.mlp.up_proj.weight$",
            ],
        },
        "Llama",
        only(
            lambda name: (
                name.startswith(("lm_head", "model.layers.1.self_attn.q_proj"))
                or name.endswith("mlp.up_proj.weight")
            )
        ),
    ),
    "llamafactory-all": (
        FACTORY | {"lora_target": "all"},
        "Llama",
        lambda model: lora(r=8, target_modules=linear(model))(model),
    ),
    "llamafactory-text": (
        FACTORY | {"lora_target": "q_proj, v_proj", "lora_rank": 4},
        "Llama",
        lora(r=4, target_modules=["q_proj", "v_proj"]),
    ),
    "llamafactory-vision": (
        FACTORY | {"lora_target": "all", "lora_rank": 4},
        "LLaVA",
        lambda model: lora(
            r=4,
            target_modules=[
                name
                for name, one in model.named_modules()
                if isinstance(one, torch.nn.Linear) and name.startswith(LANGUAGE)
            ],
        )(model),
    ),
    "llamafactory-freeze": (
        FACTORY
        | {
            "finetuning_type": "freeze",
            "freeze_trainable_layers": 1,
            "freeze_trainable_modules": "mlp",
        },
        "Llama",
        only(lambda name: ".1.mlp" in name),
    ),
}


@pytest.mark.filterwarnings("ignore")  # PEFT's, about configs that the test gives on purpose
@pytest.mark.parametrize("name", CASES)
def test_what_is_shown_is_what_training_changes(name, models, tmp_path, capsys):
    config, title, by_hand = CASES[name]
    found = shown(tmp_path, capsys, models, title, config)
    assert found["tool"] == name.split("-")[0]
    model = (by_hand or lora(**config))(BUILT[title].build())
    assert named(found) == trained(model, BUILT[title])


WARNED = [
    ("Llama", {"r": 4, "target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches nothing"),
    (
        "Llama",
        {"r": 4, "target_modules": ["q_proj", r".*\.v_proj"]},
        "matches nothing; PEFT reads an entry of a list as a name, not as an expression",
    ),
    (
        "Llama",
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
        "`layers_to_transform`: there is no block 7 among the 2 of the model",
    ),
    (
        "Llama",
        {
            "r": 4,
            "target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"],
            "layers_to_transform": [1],
        },
        "does not hold for full names such as model.layers.0.self_attn.q_proj",
    ),
    (
        "Llama",
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"w_proj": 2}},
        "rank_pattern keys did not match any targeted module and were ignored: ['w_proj']",
    ),
    (
        "Llama",
        {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "new_option": 1},
        "this PEFT ignores new_option",
    ),
    (
        "Mixtral",
        {"r": 4, "target_modules": r"model\.layers\.1\.self_attn\.o_proj"},
        "PEFT rewrites the targets of this mixture of experts: it adds model.layers.0.self_attn",
    ),
    (
        "Qwen3-MoE",
        {"r": 4, "target_modules": ["model.layers.0.mlp.down_proj"]},
        "it leaves out model.layers.0.mlp.down_proj",
    ),
    (
        "LLaVA",
        {"r": 4, "target_modules": ["q_proj"]},
        "outside the language model: model.vision_tower.encoder.layers.0.self_attn.q_proj and 1",
    ),
    (
        "Llama",
        {"use_peft": False, "lora_target_modules": ["q_proj"]},
        "without `use_peft: true` TRL ignores every lora_ key and trains all weights",
    ),
    (
        "Llama",
        {"base_model": "x", "unfrozen_parameters": ["lm_head", r"model\.layers\.0\.mlp"]},
        "matches nothing; do not escape dots",
    ),
    (
        "Llama",
        AXOLOTL | {"adapter": "lora", "lora_target_linear": True, "unfrozen_parameters": ["x"]},
        "axolotl freezes LoRA's own matrices as well: leave `unfrozen_parameters` out",
    ),
]


@pytest.mark.parametrize(("title", "config", "text"), WARNED)
def test_what_an_author_may_not_expect_is_said(title, config, text, models, tmp_path, capsys):
    found = shown(tmp_path, capsys, models, title, config)
    assert any(text in warning for warning in found["warnings"]), found["warnings"]


@pytest.mark.parametrize("name", ["peft-list", "peft-experts", "axolotl-linear", "trl-list"])
def test_a_config_without_surprises_has_no_warning(name, models, tmp_path, capsys):
    config, title, _ = CASES[name]
    config = {key: value for key, value in config.items() if value != ["x"]}
    assert shown(tmp_path, capsys, models, title, config)["warnings"] == []


REFUSED = [
    ({"foo": 1}, "must have keys of one tool .*, but has those of foo; say which it is"),
    ({"r": 4, "target_modules": ["qq"]}, "PEFT must accept this adapter for the model: Target"),
    ({"peft_type": "IA3"}, "the adapter must be LORA or ADALORA, got IA3"),
    (["q_proj"], "must be a mapping, got a list"),
    ({"use_peft": True, "lora_target_modules": ["q_proj"]}, "TRL reads a list of one name as a"),
    ({"finetuning_type": "oft"}, "must be lora, freeze or full, got 'oft'"),
    ({"r": 4, "target_parameters": "x", "target_modules": ["q_proj"]}, "peft must accept the con"),
    (
        {"base_model": "x", "unfrozen_parameters": [r"model\.layers"]},
        "the config must train something",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_config_that_cannot_be_read_is_refused(config, message, models, tmp_path, capsys):
    import re

    from keylayers.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["targets", str(path), "--model", str(models / "Llama")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_the_heatmap_shows_ranks_by_block_and_projection(models, tmp_path, capsys):
    from keylayers.cli import main

    path = tmp_path / "adapter_config.json"
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(models / "Llama")}))
    assert main(["targets", str(tmp_path)]) == 0
    first, _, title, head, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("read as peft: LoRA on 1 of 14 modules; 128 parameters")
    assert title == "model.layers"
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert head.split() == ["block", *projections]
    assert [row.split() for row in rows] == [["0", *"·······"], ["1", "4", *"······"]]
