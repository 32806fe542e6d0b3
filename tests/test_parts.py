# SPDX-License-Identifier: Apache-2.0
"""Rankings of rank-one parts: their order, what budgets buy, and ranks for training."""

import json
import math
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from commands import (
    complaint_in,
    keylayers,
    printed,
    read,
    record_of,
    verified_in,
    weights_in,
)
from keylayers import export_selection
from keylayers.errors import ConfigError, KeylayersError, RankingError
from keylayers.evaluation.verify import orders_by_singular_values
from keylayers.export import TOOLS
from keylayers.gates import part_sizes
from keylayers.model.modules import map_modules
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.updates import adapter_updates
from keylayers.updates.adapter import tuner_layers
from scored import noisy, score

from rankings import ranking_of
from tiny_models import (
    tiny_llama,
)

SCORES = [(8.0, 4.0, 2.0), (90.0, 1.0, 0.0), (6.0, 5.0, 3.0)]
SIZES = [(1, 1, 1), (30, 30, 30), (2, 2, 2)]


def of_parts(scores=SCORES, sizes=SIZES):
    modules = tuple(
        RankedModule(
            f"layers.{index}.experts.{'ab'[index % 2]}",
            *(index, "ab"[index % 2], 100, sum(own)),
            part_scores=own,
            part_parameters=size,
        )
        for index, (own, size) in enumerate(zip(scores, sizes, strict=True))
    )
    return Ranking(modules, "by hand", "part")


def taken(selection):
    return {int(name.split(".")[1]): list(kept) for name, kept in selection.parts.items()}


# budget, parts of each module: per parameter their order is 8, 4, 3, 3, 2.5, 2, 1.5, 1/30, 0
BOUGHT = [
    (1, {0: [0]}),
    ("3", {0: [0, 1], 1: [0]}),  # of equal parts the first in the model
    ("0.03x-params", {0: [0, 1]}),
    ("0.4x-params", {0: [0, 1, 2], 1: [0], 2: [0, 1, 2]}),
    (0.5, {0: [0, 1], 1: [0], 2: [0, 1]}),
    (1.0, {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2]}),
]


@pytest.mark.parametrize(("budget", "parts"), BOUGHT)
def test_parts_are_bought_by_score_per_parameter(budget, parts):
    ranking = of_parts()
    selection = ranking.select(budget)
    assert taken(selection) == parts
    assert selection.ranks == {
        module.name: len(parts[place])
        for place, module in enumerate(ranking.modules)
        if place in parts
    }
    sizes = [SIZES[place][index] for place, kept in parts.items() for index in kept]
    assert selection.num_parameters == sum(sizes)
    assert selection.num_candidate_parameters == 99


def test_ranks_that_must_be_multiples_are_filled_with_the_next_parts():
    assert taken(of_parts().select(1, rank_multiple=2)) == {0: [0, 1]}
    # never more than there are, and never above the budget
    assert taken(of_parts().select(3, rank_multiple=4)) == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert taken(of_parts().select("0.1x-params", rank_multiple=3)) == {0: [0, 1, 2]}


REFUSED = [
    ("0.5x-time", "needs a ranking of modules, but this one is of rank-one parts"),
    ("2GiB", "needs a ranking of modules, but this one is of rank-one parts"),
    ("10", "between 1 and 9, the ranking's parts, got 10"),
    ("0.001x-params", "at least the best part, which takes 1 parameters, but .* allows 0"),
]


@pytest.mark.parametrize(("budget", "message"), REFUSED)
def test_budgets_that_buy_no_parts_are_refused(budget, message):
    with pytest.raises(KeylayersError, match=message):
        of_parts().select(budget)


def test_ranks_go_into_the_config_with_alphas_that_keep_the_scaling():
    ranking = of_parts()
    config = ranking.select(0.5).lora_config(lora_alpha=4)
    names = [module.name for module in ranking.modules]
    assert (config.r, config.lora_alpha) == (2, 4)
    assert (config.rank_pattern, config.alpha_pattern) == ({names[1]: 1}, {names[1]: 2})
    with pytest.raises(TypeError, match="`r` comes from the selection"):
        ranking.select(0.5).lora_config(r=3)
    with pytest.raises(ConfigError, match=r"by rank-one parts, but this one is by module|part"):
        ranking_of([1.0, 2.0]).select(1, rank_multiple=2)


def test_a_ranking_of_parts_is_the_same_from_its_file(tmp_path):
    of_parts().save(tmp_path / "ranking.json")
    assert Ranking.load(tmp_path) == of_parts()
    plain = ranking_of([1.0])
    plain.save(tmp_path / "plain.json")
    assert "part" not in (tmp_path / "plain.json").read_text().replace("by part", "")
    with pytest.raises(RankingError, match="scores of rank-one parts if its granularity is part"):
        replace(of_parts(), granularity="module")


BY_HAND = [
    ({"part_scores": [8.0]}, r"as many `part_scores` as `part_parameters`, which .* \(1 and 3\)"),
    ({"part_scores": [8.0, 1.0, math.nan]}, r"part_scores\[2\]` must be a finite number"),
    ({"part_parameters": [1, 1, 0]}, r"part_parameters\[2\]` must be greater than or equal to 1"),
    ({"part_parameters": [1, 1, 10**400]}, r"part_parameters\[2\]` must be less than"),
    ({"part_scores": [], "part_parameters": []}, "must hold at least one, got none"),
    (
        {"part_scores": [8.0], "part_parameters": [1], "has_magnitude_part": True},
        "a module with a part besides DoRA's magnitude",
    ),
]


@pytest.mark.parametrize(("change", "message"), BY_HAND)
def test_a_file_with_other_parts_is_refused(tmp_path, change, message):
    content = of_parts(SCORES[:1], SIZES[:1]).to_json()
    content["modules"][0] |= change
    (tmp_path / "ranking.json").write_text(json.dumps(content))
    with pytest.raises(RankingError, match=message):
        Ranking.load(tmp_path)


ON_PARTS = ("elimination", "fisher-pruning", "path", "price", "ila", "leave-one-out", "shapley")


@pytest.mark.parametrize("method", ON_PARTS)
def test_methods_score_parts(method):
    found = score(noisy(), method, granularity="part")
    updates = adapter_updates(noisy().model)
    assert [len(parts.scores) for parts in found.parts] == [
        update.layer.r["default"] for update in updates
    ]
    assert found.scores == pytest.approx([sum(parts.scores) for parts in found.parts])
    sizes = [size for parts in found.parts for size in parts.num_parameters]
    assert sizes == list(part_sizes(updates).values())
    assert sum(sizes) == sum(
        value.numel() for name, value in noisy().model.named_parameters() if "lora_" in name
    )


def test_path_integrals_of_parts_sum_to_those_of_modules():
    """Up to rounding: a module's gate moves all of its parts together."""
    of_modules, of_parts = (score(noisy(), "path", granularity=own) for own in ("module", "part"))
    assert of_parts.scores == pytest.approx(of_modules.scores, rel=1e-4, abs=1e-6)
    assert of_parts.standard_errors is None


def test_orders_by_singular_values_by_hand():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    values = ((3.0, 2.0), (10.0, 1.0))
    for layer, own in zip(model.get_base_model().model.layers, values, strict=True):
        lora = layer.self_attn.q_proj
        scaling = lora.scaling["default"]
        with torch.no_grad():
            lora.lora_A["default"].weight.copy_(torch.eye(2, 16))
            lora.lora_B["default"].weight.copy_(torch.eye(16, 2) * torch.tensor(own) / scaling)
    found = orders_by_singular_values(adapter_updates(model))
    short = {
        rule: [(int(name.split(".")[2]), int(name[-2])) for name in order]
        for rule, order in found.items()
    }
    assert short["uniform rank"] == [(1, 0), (0, 0), (0, 1), (1, 1)]
    assert short["singular value"] == [(1, 0), (0, 0), (0, 1), (1, 1)]
    assert short["energy per parameter"] == [(1, 0), (0, 0), (0, 1), (1, 1)]
    assert short["share of energy"] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert short["ratio to the largest"] == [(0, 0), (1, 0), (0, 1), (1, 1)]


MODELS = {one.title: one for one in ARCHITECTURES if one.title in ("Llama", "GPT-2", "Mixtral")}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")
# PEFT 0.21 looks for them among modules only, but uses those of parameters all the same.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any")
@pytest.mark.parametrize("title", MODELS)
@pytest.mark.parametrize("budget", [0.1, 0.6])
def test_exported_ranks_are_what_peft_gives_the_modules(tmp_path, title, budget):
    made_by = {"model": {"name": "org/base"}, "options": {"lora_rank": 4, "lora_alpha": 12}}
    draw = random.Random(0)
    ranked = tuple(
        replace(
            RankedModule.of(module, 0.0),
            part_scores=tuple(draw.random() for _ in range(4)),
            part_parameters=(sum(module.shape[-2:]),) * 4,
        )
        for module in map_modules(MODELS[title].build())
    )
    ranking = Ranking(ranked, "by hand", "part", made_by)
    ranks = ranking.select(budget).ranks
    export_selection(ranking, budget, "peft", tmp_path / "peft")
    export_selection(ranking, budget, "axolotl", tmp_path / "axolotl")
    of_axolotl = yaml.safe_load((tmp_path / "axolotl" / "axolotl.yaml").read_text())
    names = ("r", "alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters")
    own = {name: of_axolotl.get(f"lora_{name}") for name in names}
    own["lora_alpha"] = own.pop("alpha")
    config = PeftConfig.from_pretrained(tmp_path / "peft")
    for given in (config, LoraConfig(**own), ranking.select(budget).lora_config(lora_alpha=12)):
        layers = tuner_layers(get_peft_model(MODELS[title].build(), given))
        assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
        assert len({layer.scaling["default"] for layer in layers.values()}) == 1
    defined = {}
    exec((tmp_path / "peft" / "selected.py").read_text(), defined)
    layers = tuner_layers(defined["selected_lora"](MODELS[title].build()))
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    for tool in TOOLS.keys() - {"peft", "axolotl"}:
        with pytest.raises(ConfigError, match="ranks of modules are for LoRA with peft or axolotl"):
            export_selection(ranking, budget, tool, tmp_path / tool)
    with pytest.raises(ConfigError, match="ranks of modules are for LoRA"):
        export_selection(ranking, budget, "peft", tmp_path / "full", kind="full")


def test_verify_compares_parts_with_orders_by_singular_values(ranked_parts, tmp_path):
    fast = ("--points", "4", "--random-orders", "1", "--output", tmp_path / "seen")
    assert keylayers("verify", "--ranking", ranked_parts, *fast) == 0
    found = verified_in(tmp_path / "seen")
    assert len(found["rivals"]) == 5
    total = read(ranked_parts)
    every = sum(size for module in total["modules"] for size in module["part_parameters"])
    for curve in (found["best_first"], *found["random"], *found["rivals"].values()):
        assert curve["num_parameters"][-1] == every
        assert curve["losses"][0] == found["best_first"]["losses"][0]
        assert curve["losses"][-1] == found["best_first"]["losses"][-1]


def test_training_gives_modules_the_ranks_of_their_parts(ranked_parts, tmp_path):
    out = tmp_path / "tuned"
    more = ("--steps", "2", "--controls", "random", "worst", "uniform", "first", "last", "all")
    budget = ("--budget", "0.4x-params")
    code, said, err = printed("train", "--ranking", ranked_parts, *budget, *more, "--output", out)
    assert code == 0, err
    selection = Ranking.load(ranked_parts).select("0.4x-params")
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(value)
        for name, value in weights_in(out).items()
        if name.endswith("lora_A.weight")
    }
    assert ranks == selection.ranks
    rows = {row["label"]: row for row in record_of(out)["results"]}
    own = rows["selected"]["num_trained_parameters"]
    assert own == selection.num_parameters
    assert rows["uniform"]["num_trained_parameters"] <= own
    for control in ("random", "worst", "first", "last"):
        assert 0 < rows[control]["num_trained_parameters"] != own
        assert control in said


def test_what_does_not_go_with_ranks_is_refused(ranked, ranked_parts, tmp_path):
    for update in ("full", "adalora"):
        wanted = ("--budget", "3", "--update", update, "--output", tmp_path / "out")
        code, _, err = printed("train", "--ranking", ranked_parts, *wanted)
        assert (code, "`update` must be lora, rslora or dora" in complaint_in(err)) == (2, True)
    wanted = ("--budget", "1", "--controls", "uniform", "--output", tmp_path / "out")
    code, _, err = printed("train", "--ranking", ranked_parts, *wanted)
    assert (code, "uniform needs a budget of rank 1 in every module" in complaint_in(err)) == (
        2,
        True,
    )
    wanted = ("--budget", "3", "--controls", "uniform", "--output", tmp_path / "out")
    code, _, err = printed("train", "--ranking", ranked, *wanted)
    assert (code, "needs a ranking of rank-one parts" in complaint_in(err)) == (2, True)


@pytest.mark.parametrize("command", ["prune", "verify"])
@pytest.mark.parametrize(
    ("update", "message"),
    [
        (("--adapter", "adapter"), "must have the rank-one parts that were ranked, but .* has 2"),
        (("--tuned", "tuned"), "make an adapter of the difference with `keylayers extract`"),
    ],
)
def test_an_update_without_the_ranked_parts_is_refused(
    tiny, ranked_parts, tmp_path, command, update, message
):
    flag, name = update
    wanted = ("--ranking", ranked_parts, flag, tiny / name, "--output", tmp_path / "out")
    budget = ("--budget", "0.3") if command == "prune" else ()
    code, _, err = printed(command, *wanted, *budget)
    assert code == 2, err
    assert re.search(message, complaint_in(err))


@pytest.mark.parametrize("command", ["prune", "verify"])
def test_parts_of_other_weights_are_refused(ranked, ranked_parts, tmp_path, command):
    other = shutil.copytree(ranked / "adapter", tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, other / "adapter_model.safetensors"
    )
    wanted = ("--ranking", ranked_parts, "--adapter", other, "--output", tmp_path / "out")
    budget = ("--budget", "0.3") if command == "prune" else ()
    code, _, err = printed(command, *wanted, *budget)
    assert (code, "parts were ranked, but its weights differ" in complaint_in(err)) == (2, True)
    assert not (tmp_path / "out").exists()


def test_modules_are_neither_frozen_nor_averaged_by_parts(tiny, ranked_parts, tmp_path):
    own = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    code, _, err = printed("train", "--rank-first", "--granularity", "part", *own)
    assert (code, "where modules are frozen, got part" in complaint_in(err)) == (2, True)
    both = (ranked_parts, ranked_parts)
    code, _, err = printed("compare", *both, "--consensus", tmp_path / "consensus.json")
    assert (code, "one is of rank-one parts" in complaint_in(err)) == (2, True)


def test_rankings_of_parts_of_other_models_are_compared_by_modules():
    ranking = of_parts()
    deeper = replace(
        ranking,
        modules=tuple(
            replace(module, name=f"{place}.{module.name}", block_index=index)
            for place in (0, 1)
            for index, module in enumerate(ranking.modules, start=3 * place)
        ),
    )
    (found,) = agreement([ranking, deeper], 0.5)
    assert (found.is_by_depth, found.jaccard) == (True, 1.0)


UNSEEN = [
    (("--update", "full"), "`granularity` part needs a LoRA update, got `update` full"),
    (("--update", "full", "--granularity", "module"), "which the difference of two checkpoints"),
    (("--tuned", "tuned", "--granularity", "module"), "which the difference of two checkpoints"),
    (("--update", "adalora"), "which the AdaLoraUpdate of .* does not have"),
]


@pytest.mark.parametrize(("more", "message"), UNSEEN)
def test_updates_without_gradients_of_examples_are_refused_before_training(
    tiny, tmp_path, monkeypatch, more, message
):
    monkeypatch.chdir(tiny)
    own = ("--model", "model", "--data", "data.jsonl", "--output", tmp_path / "out")
    parts = () if "--granularity" in more else ("--granularity", "part")
    code, _, err = printed("rank", *own, "--method", "fisher-pruning", *parts, *more)
    assert code == 2, err
    assert re.search(message, complaint_in(err))
    assert "stage 1 ended" not in err
