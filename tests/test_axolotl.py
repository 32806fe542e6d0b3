# SPDX-License-Identifier: Apache-2.0
"""The plugin for axolotl: what it sets in a config, what it refuses, what axolotl then trains.

The long tests run axolotl itself on the CPU. `AXOLOTL` names the Python of an environment that has
it (`.ci/run` makes one); without it they are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from commands import best, changed_weights, keylayers, updated_modules
from keylayers.errors import ConfigError, KeylayersError
from keylayers.export.axolotl import added_to, selected_in
from keylayers.export.settings import Settings
from keylayers.model.modules import map_modules
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.verification import verification_file
from tiny_files import write_mixture

from rankings import FALLING, ranking_of, verification_of

PLUGIN = "keylayers.integrations.axolotl.KeylayersPlugin"
SELECTION = ranking_of([*FALLING]).select(2)  # both modules of block 0
REGEX = r"model\.layers\.(?:0\.a_proj|0\.b_proj)"
PATTERNS = ["^model.layers.0.a_proj.(weight|bias)$", "^model.layers.0.b_proj.(weight|bias)$"]
OF_LORA = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": REGEX}


def settings(kind, selection=SELECTION, alpha=32):
    return Settings(selection, "m", kind, lora_rank=16, lora_alpha=alpha)


def parts_of(*scores):
    """A selection of rank-one parts of two modules."""
    modules = tuple(
        RankedModule(
            f"model.layers.0.{kind}_proj",
            0,
            f"{kind}_proj",
            10,
            sum(own),
            part_scores=tuple(own),
            part_parameters=(10,) * len(own),
        )
        for kind, own in zip("ab", scores, strict=True)
    )
    return Ranking(modules, "by hand", "part").select(0.75)


@pytest.mark.parametrize(
    ("kind", "config", "added"),
    [
        ("lora", {}, OF_LORA),
        ("lora", {"lora_r": 4, "lora_alpha": 4}, OF_LORA | {"lora_r": 4, "lora_alpha": 4}),
        ("lora", {"lora_target_linear": False, "lora_target_modules": None}, OF_LORA),
        ("lora", OF_LORA, OF_LORA),  # in a worker
        ("full", {}, {"unfrozen_parameters": PATTERNS}),
        (
            "full",
            {"gradient_checkpointing": True},
            {
                "unfrozen_parameters": PATTERNS,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
    ],
)
def test_a_config_gets_what_selects_the_modules(kind, config, added):
    given = dict(config)
    assert added_to(config, settings(kind)) == added
    assert config == given


def test_a_config_gets_the_ranks_of_parts():
    own = settings("lora", parts_of((3.0, 2.0), (1.0, 0.0)))
    added = {
        "lora_r": 2,
        "lora_alpha": 4,
        "lora_rank_pattern": {"model.layers.0.b_proj": 1},
        "lora_alpha_pattern": {"model.layers.0.b_proj": 2},
        "lora_target_modules": REGEX,
    }
    assert added_to({}, own) == added
    assert added_to(added, own) == added


PARTS = parts_of((3.0, 2.0), (1.0,))
USE_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("lora", {"lora_target_linear": True}),
        ("lora", {"lora_modules_to_save": ["lm_head"]}),
        ("lora", {"lora_target_modules": ["q_proj"]}),
        ("lora", {"lora_target_parameters": ["experts.gate_up_proj"]}),
        ("lora", {"peft_layers_to_transform": [0]}),
        ("lora", {"peft_trainable_token_indices": [1]}),
        ("lora", {"unfrozen_parameters": PATTERNS}),
        ("full", {"unfrozen_parameters": ["model.norm"]}),
        ("full", {"lisa_n_layers": 2}),
        ("full", USE_REENTRANT | {"gradient_checkpointing": True}),
    ],
)
def test_what_trains_anything_else_is_refused(kind, config):
    key = next(iter(config))
    with pytest.raises(ConfigError, match=f"`{key}` must be left out with a ranking of keylayers"):
        added_to(config, settings(kind))


def test_ranks_that_axolotl_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="`lora_r` must be left out"):
        added_to({"lora_r": 8}, settings("lora", PARTS))
    with pytest.raises(ConfigError, match="rank-one parts are for LoRA: set `adapter`"):
        added_to({}, settings("full", PARTS))
    with pytest.raises(ConfigError, match=r"whole numbers as alpha, and the ranks need 0\.5"):
        added_to({}, settings("lora", PARTS, alpha=4))


@pytest.mark.parametrize("adapter", ["lora", None])
def test_targets_knows_what_the_plugin_selects(tiny, ranked, tmp_path, capsys, adapter):
    config = {"base_model": "m", "adapter": adapter, "plugins": [PLUGIN]}
    config |= {"keylayers_ranking": str(ranked), "keylayers_budget": 5}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    words = (tmp_path / "c.yaml", "--model", tiny / "model", "--json", "--tool", "axolotl")
    assert keylayers("targets", *words) == 0
    rows = json.loads(capsys.readouterr().out)["modules"]
    trained = {row["name"] for row in rows if row["lora_rank"] or row["num_trained_weights"]}
    assert trained == best(ranked, 5)


def test_an_auto_budget_is_what_verify_recommended(tmp_path):
    ranking = ranking_of([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    ranking.save(tmp_path / "ranking.json")
    config = {"keylayers_ranking": str(tmp_path), "keylayers_budget": "auto"}
    with pytest.raises(KeylayersError, match="keylayers verify"):
        selected_in(config)
    found = verification_of(ranking)
    found.save(verification_file(tmp_path))
    selection = selected_in(config).selection
    assert selection.names == ranking.select(found.recommendation.num_modules).names


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keylayers_budget": None}, "the plugin of keylayers needs `keylayers_budget`"),
        ({"keylayers_budget": "12GiB"}, "`budget` 12GiB needs a measured training step"),
        ({"keylayers_budget": True}, "`budget` must be a fraction"),
        ({"adapter": "llama-adapter"}, "`adapter` must be lora, qlora or left out"),
        ({"keylayers_ranking": "no-such"}, "no-such"),
    ],
)
def test_keys_that_select_nothing_are_refused(ranked, keys, message):
    config = {"keylayers_ranking": str(ranked), "keylayers_budget": 0.3, "adapter": "lora"}
    with pytest.raises(KeylayersError, match=message):
        selected_in(config | keys)


AXOLOTL = os.environ.get("AXOLOTL")
long = pytest.mark.long
with_axolotl = pytest.mark.skipif(
    not AXOLOTL, reason="set AXOLOTL to the Python of an environment with axolotl 0.19.0"
)
NO_KERNELS = {f"lora_{kind}_kernel": False for kind in ("mlp", "qkv", "o")}  # they need CUDA
LORA = {"adapter": "lora", **NO_KERNELS}
TRAINED = {  # title: keys of the config
    "full": {"gradient_checkpointing": True},
    "lora": LORA,
    "dora": LORA | {"peft_use_dora": True},
    "qlora": LORA | {"adapter": "qlora", "load_in_4bit": True},
    "parts": LORA,
    "mixture": LORA,
    "another model": LORA,
    "the page's": NO_KERNELS,
    "another plugin": {"plugins": [PLUGIN, "axolotl_runs.UnfreezesLater"]},
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "exports.md"
CHECKED = {  # not trained
    "linear": LORA | {"lora_target_linear": True},
    "no budget": LORA | {"keylayers_budget": None},
    "another adapter": {"adapter": "llama-adapter"},
    "memory": LORA | {"keylayers_budget": "12GiB"},
    "without the plugin": LORA | {"plugins": [], "lora_target_linear": True},
}


@pytest.fixture(scope="module")
def mixture(tiny, once):
    """A folder with a mixture of experts, and a ranking of its modules by hand."""

    def write(folder):
        write_mixture(tiny, folder)
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        modules = enumerate(map_modules(model))
        ranked = tuple(RankedModule.of(one, float(place * 5 % 12)) for place, one in modules)
        made_by = {"model": {"name": str(folder / "model")}}
        Ranking(ranked, "by hand", provenance=made_by).save(folder / "ranking.json")

    return once("mixture_for_axolotl", write)


@pytest.fixture(scope="module")
def axolotl(tiny, ranked, ranked_parts, mixture, tmp_path_factory):
    """What axolotl made of each config, and the folders that it wrote; in one process."""
    root = tmp_path_factory.mktemp("axolotl")
    common = {
        "base_model": str(tiny / "model"),
        "plugins": [PLUGIN],
        "keylayers_ranking": str(ranked),
        "keylayers_budget": 0.3,
        "datasets": [
            {
                "path": str(tiny / "data.jsonl"),
                "ds_type": "json",
                "type": {"field_instruction": "prompt", "field_output": "completion"}
                | {"format": "{instruction} "},
            }
        ],
        "dataset_prepared_path": str(root / "prepared"),
        "dataset_num_proc": 1,
        "val_set_size": 0,
        "sequence_len": 64,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "bf16": False,
        "fp16": False,
        "attn_implementation": "eager",
        "save_strategy": "no",
    }
    page = yaml.safe_load(PAGE.read_text().partition("```yaml\n")[2].partition("```")[0])
    rows = map(json.loads, (tiny / "data.jsonl").read_text().splitlines())
    with (root / "chats.jsonl").open("w") as chats:
        for row in rows:
            turns = zip(("user", "assistant"), (row["prompt"], row["completion"]), strict=True)
            messages = [{"role": role, "content": content} for role, content in turns]
            chats.write(json.dumps({"messages": messages}) + "\n")
    page["datasets"][0]["path"] = str(root / "chats.jsonl")
    own = ("base_model", "keylayers_ranking", "sequence_len")  # as in `common`
    more = {
        "the page's": {key: value for key, value in page.items() if key not in own},
        "parts": {"keylayers_ranking": str(ranked_parts)},
        "mixture": {"keylayers_ranking": str(mixture), "base_model": str(mixture / "model")},
        "another model": {"base_model": str(tiny / "wide")},
    }
    jobs = []
    for title, keys in (TRAINED | CHECKED).items():
        config = common | keys | more.get(title, {}) | {"output_dir": str(root / title)}
        file = root / f"{title}.yaml"
        file.write_text(yaml.safe_dump(config))
        jobs.append({"file": str(file), "is_trained": title in TRAINED})
    source = Path(__file__).resolve().parents[1] / "src"
    done = subprocess.run(
        [AXOLOTL, "-W", "ignore", Path(__file__).with_name("axolotl_runs.py")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(source), "AXOLOTL_DO_NOT_TRACK": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return root, dict(zip(TRAINED | CHECKED, answers, strict=True))


@long
@with_axolotl
@pytest.mark.parametrize("title", ["full", "lora", "dora", "qlora", "the page's"])
def test_axolotl_changes_exactly_the_selected_modules(axolotl, tiny, ranked, title):
    root, answers = axolotl
    assert "error" not in answers[title]
    if title == "full":
        names = {f"{name}.weight" for name in best(ranked, 6)}
        assert changed_weights(tiny / "model", root / title) == names
    else:
        assert updated_modules(root / title) == best(ranked, 6)


@long
@with_axolotl
def test_axolotl_gives_the_modules_of_selected_parts_their_ranks(axolotl, ranked_parts):
    root, answers = axolotl
    assert "error" not in answers["parts"]
    ranks = Ranking.load(ranked_parts).select(0.3).ranks
    config = json.loads((root / "parts" / "adapter_config.json").read_text())
    assert updated_modules(root / "parts") == set(ranks)
    assert {name: config["rank_pattern"].get(name, config["r"]) for name in ranks} == ranks


@long
@with_axolotl
def test_axolotl_trains_the_selection_of_a_mixture_of_experts(axolotl):
    """What is trained is compared by the plugin: PEFT's file has other names for experts."""
    root, answers = axolotl
    assert "error" not in answers["mixture"]
    assert (root / "mixture" / "adapter_model.safetensors").is_file()


@long
@with_axolotl
@pytest.mark.parametrize(
    ("title", "message"),
    [
        ("another model", "RankingError: the ranking must be of this model, but 21 of 21 modules"),
        ("another plugin", "GuardError: the trainable modules must be exactly the selection"),
        ("linear", "ConfigError: `lora_target_linear` must be left out with a ranking"),
        ("no budget", "ConfigError: the plugin of keylayers needs `keylayers_budget`"),
        ("another adapter", "ConfigError: `adapter` must be lora, qlora or left out"),
        ("memory", "ConfigError: `budget` 12GiB needs a measured training step"),
    ],
)
def test_axolotl_stops_with_one_clear_line(axolotl, title, message):
    error = axolotl[1][title]["error"]
    assert error.startswith(message)
    assert "\n" not in error


@long
@with_axolotl
def test_a_later_config_without_the_plugin_is_left_alone(axolotl):
    found = axolotl[1]["without the plugin"]
    assert found["lora_target_linear"]
    assert "lora_target_modules" not in found
