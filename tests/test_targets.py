# SPDX-License-Identifier: Apache-2.0
"""`keylayers targets` says what PEFT and other trainers really train: equality of sets."""

import json
import re

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from architectures import ARCHITECTURES, changed_modules, trainer_of
from commands import complaint, keylayers

BUILT = {one.title: one for one in ARCHITECTURES}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the configs of one model of each kind, without weights."""
    folder = tmp_path_factory.mktemp("models")
    for title in ("Llama", "Mixtral", "Qwen3-MoE", "LLaVA", "GPT-2"):
        model = BUILT[title].build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder / title)
    return folder


@pytest.fixture
def shown(models, tmp_path, capsys):
    """What the command prints as JSON for a model and a config, or what it complains of."""

    def show(title, config, code=0):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        assert keylayers("targets", path, "--model", models / title, "--json") == code
        return complaint(capsys) if code else json.loads(capsys.readouterr().out)

    return show


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


def lora(targets, **more):
    return {"r": 4, "target_modules": targets} | more


def by_hand(model, way):
    """A model with LoRA by PEFT, or one that trains the parameters of which the way is true."""
    if isinstance(way, dict):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **way))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(way(name)))
    return model


AXOLOTL = {"base_model": "b", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "adapter": "lora"}
LINEAR = AXOLOTL | {"lora_target_linear": True}
SFT = {"model_name_or_path": "b", "stage": "sft"}
FREEZE = {"finetuning_type": "freeze", "freeze_trainable_layers": 1}
QUERY, DENSE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SAVED = lora("dummy-target-modules", modules_to_save=["model.layers.1.mlp.up_proj"])
OF_W = ["o_proj", "w1", "w2", "w3"]
OUTPUT = r"model\.layers\.1\.self_attn\.o_proj"
UNFROZEN = ["^lm_head.weight$[:32]", QUERY, "model.layers.[0-9]+.mlp.up_proj.weight$"]
LANGUAGE = r"model\.language_model\.layers\..*_proj"
VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
REWRITES = "PEFT rewrites the targets of this mixture of experts: it "
# tool/model/case -> config, the same by hand (None: it is PEFT's own), parts of its warnings
CASES = {
    "peft/Llama/list": (lora(["q_proj", "v_proj"]), None),
    "peft/Llama/regex": (lora(r".*\.1\.mlp\.(up|down)_proj"), None),
    "peft/Llama/linear": (lora("all-linear"), None),
    "peft/Llama/layers": (lora(["q_proj", "down_proj"], layers_to_transform=[1]), None),
    "peft/Llama/excluded": (lora(["q_proj", "k_proj"], exclude_modules=[QUERY]), None),
    "peft/Llama/dora": (lora(["k_proj", "q_proj"], use_dora=True), None),
    "peft/Llama/ranks": (lora(["k_proj", "q_proj"], rank_pattern={"k_proj": 2}), None),
    "peft/GPT-2/conv1d": (lora(["c_attn"], fan_in_fan_out=True), None),
    "peft/Mixtral/experts": (lora(["q_proj"], target_parameters=["experts.down_proj"]), None),
    "peft/Mixtral/regex": (lora(OUTPUT), None, REWRITES + "adds model.layers.0.self_attn"),
    "peft/Qwen3-MoE/dense": (
        lora([DENSE]), None, REWRITES + "adds model.layers.1.mlp.experts", f"leaves out {DENSE}"),
    "peft/LLaVA/vision": (
        lora(["q_proj", "fc1"]), None, f"outside the language model: {VISION} and 3 more"),
    "peft/Llama/typo": (lora(["q_proj", "v_prj"]), None, "'v_prj' matches nothing"),
    "peft/Llama/regex in list": (
        lora(["q_proj", r".*\.v_proj"]), None,
        "matches nothing; PEFT reads an entry of a list as a name, not as an expression"),
    "peft/Llama/no such block": (
        lora(["q_proj"], layers_to_transform=[1, 7]), None,
        "`layers_to_transform`: there is no block 7 among the 2 of the model"),
    "peft/Llama/blocks of full names": (
        lora(["model.layers.0.self_attn.q_proj"], layers_to_transform=[1]), None,
        "`layers_to_transform` does not hold for full names such as model.layers.0.self_attn.q"),
    "peft/Llama/no blocks": (
        lora(["q_proj"], layers_to_transform=[]), None,
        "`layers_to_transform` is empty, which PEFT reads as all blocks"),
    "peft/Llama/no such rank": (
        lora(["q_proj"], rank_pattern={"w_proj": 2}), None,
        "rank_pattern keys did not match any targeted module and were ignored: ['w_proj']"),
    "peft/Llama/unknown": (
        lora(["q_proj"], new_option=1), lora(["q_proj"]), "this PEFT ignores new_option"),
    "trl/Llama/default rank": (
        {"use_peft": True, "lora_target_modules": ["q_proj", "up_proj"]},
        lora(["q_proj", "up_proj"], r=16)),
    "trl/Llama/saved": (
        {"use_peft": True, **{f"lora_{name}": SAVED[name] for name in SAVED}}, SAVED),
    "trl/Llama/without peft": (
        {"use_peft": False, "lora_target_modules": ["q_proj"]}, bool,
        "TRL reads a list of one name as a regular expression over whole names",
        "without `use_peft: true` TRL ignores every lora_ key and trains all weights"),
    "axolotl/Llama/linear": (
        LINEAR | {"lora_target_modules": ["x"]}, lora("all-linear"), "'x' matches nothing"),
    "axolotl/Mixtral/regex": (
        AXOLOTL | {"adapter": "qlora", "lora_target_modules": OF_W}, lora(OF_W),
        "rank_pattern keys", "alpha_pattern keys", REWRITES + "adds"),
    "axolotl/Llama/unfrozen": (
        {"base_model": "b", "unfrozen_parameters": UNFROZEN},
        re.compile(rf"lm_head|{QUERY}|.*mlp\.up_proj").match),
    "axolotl/Llama/escaped dots": (
        {"base_model": "b", "unfrozen_parameters": ["lm_head", r"model\.layers\.0"]},
        re.compile("lm_head").match, "matches nothing; do not escape dots"),
    "axolotl/Llama/frozen lora": (
        LINEAR | {"unfrozen_parameters": ["x"]}, lora("all-linear"),
        "axolotl freezes LoRA's own matrices as well: leave `unfrozen_parameters` out"),
    "llamafactory/Llama/default rank": (SFT | {"lora_target": "all"}, lora("all-linear", r=8)),
    "llamafactory/Llama/text": (
        SFT | {"lora_target": "q_proj, v_proj", "lora_rank": 4}, lora(["q_proj", "v_proj"])),
    "llamafactory/LLaVA/language": (SFT | {"lora_target": "all", "lora_rank": 4}, lora(LANGUAGE)),
    "llamafactory/Llama/freeze": (
        SFT | FREEZE | {"freeze_trainable_modules": "mlp"}, re.compile(r".*\.1\.mlp").match),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # PEFT's, about configs that the test gives on purpose
@pytest.mark.parametrize("name", CASES)
def test_what_is_shown_is_what_training_changes_and_surprises_are_said(name, shown):
    (tool, title, _), (config, way, *warnings) = name.split("/"), CASES[name]
    found = shown(title, config)
    assert found["tool"] == tool
    assert named(found) == trained(by_hand(BUILT[title].build(), way or config), BUILT[title])
    for part, warning in zip(warnings, found["warnings"], strict=True):
        assert part in warning


REFUSED = [
    ({"foo": 1}, "must have keys of one tool .*, but has those of foo; say which it is"),
    (lora(["qq"]), "PEFT must accept this adapter for the model: Target"),
    ({"peft_type": "IA3"}, "the adapter must be LORA or ADALORA, got IA3"),
    (["q_proj"], "must map options to values, got a list"),
    ({"use_peft": True, "lora_target_modules": ["q_proj"]}, "TRL reads a list of one name"),
    ({"finetuning_type": "oft"}, "must be lora, freeze or full, got 'oft'"),
    (lora(["q_proj"], target_parameters="x"), "peft must accept the con"),
    ({"base_model": "x", "unfrozen_parameters": [r"model\.layers"]}, "must train something"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_a_config_that_cannot_be_read_is_refused(config, message, shown):
    assert re.search(message, shown("Llama", config, code=2))


def test_the_heatmap_shows_ranks_by_block_and_projection(models, tmp_path, capsys):
    path = tmp_path / "adapter_config.json"
    config = {"peft_type": "LORA"} | lora(["q_proj"], layers_to_transform=[1])
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(models / "Llama")}))
    assert keylayers("targets", tmp_path) == 0
    first, _, title, head, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("read as peft: LoRA on 1 of 14 modules; 128 parameters")
    assert title == "model.layers"
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert head.split() == ["block", *projections]
    assert [row.split() for row in rows] == [["0", *"·······"], ["1", "4", *"······"]]
