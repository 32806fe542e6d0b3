# SPDX-License-Identifier: Apache-2.0
"""Rankings of rank-one parts: their order, what budgets buy, and adapters cut to them."""

import json
import math
import random
import re
from dataclasses import replace

import pytest
import torch
import yaml
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from architectures import ARCHITECTURES
from commands import (
    PLAIN_PEFT,
    complaint_in,
    fresh_process,
    keylayers,
    printed,
    rank,
    read,
    record_of,
    verified_in,
    weights_in,
)
from keylayers import export_selection
from keylayers.apply.prune import prune_adapter
from keylayers.commands.run_verify import orders_by_singular_values
from keylayers.errors import ConfigError, KeylayersError, RankingError
from keylayers.export import TOOLS
from keylayers.gates import gated, part_name, part_sizes
from keylayers.model.modules import map_modules
from keylayers.ranking.compare import agreement
from keylayers.ranking.parts import parts_in_order
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.updates import adapter_updates
from keylayers.updates.adapter import tuner_layers
from scored import noisy, score
from tiny_files import add_noise, write_mixture

from rankings import ranking_of
from tiny_models import TinyExperts, in_float64, some_tokens, tiny_gpt2, tiny_llama, token_loss

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


ALL = "all-linear"
EXPERTS = {"target_modules": ["mix"], "target_parameters": ["experts.up_proj", "experts.down_proj"]}
LINEAR_WEIGHT = {"target_modules": ["lm_head"], "target_parameters": ["mix.weight"]}
GPT2 = {"target_modules": ["wte", "wpe", "c_attn"], "fan_in_fan_out": True}
KINDS = {
    "LoRA": (tiny_llama, {}),
    "rsLoRA": (tiny_llama, {"use_rslora": True}),
    "DoRA": (tiny_llama, {"use_dora": True}),
    "own ranks": (tiny_llama, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}}),
    "saved whole": (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "Conv1D and two embeddings": (tiny_gpt2, GPT2),
    "experts": (TinyExperts, EXPERTS),
    "the weight of a linear layer": (
        TinyExperts,
        {"target_modules": ["lm_head"], "target_parameters": ["mix.weight"]},
    ),
    "AdaLoRA": (tiny_llama, {"kind": AdaLoraConfig, "r": 8, "init_r": 4, "total_step": 10}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Could not identify embedding layer")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("make", "options"), KINDS.values(), ids=KINDS)
def test_a_cut_adapter_loads_with_plain_peft_and_computes_what_its_gates_do(
    tmp_path, make, options, dtype
):
    options = {"r": 4, "target_modules": ALL, "lora_alpha": 6} | options
    kind = options.pop("kind", LoraConfig)
    full, cut = tmp_path / "full", tmp_path / "cut"
    made = get_peft_model(in_float64(make()), kind(**options))
    torch.manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name and "ranknum" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    made.to(dtype).save_pretrained(full)
    cut.mkdir()

    def loaded(folder):
        found = PeftModel.from_pretrained(
            in_float64(make()), folder, is_trainable=kind is AdaLoraConfig and folder == full
        )
        return found.to(torch.float64).eval()

    model, tokens = loaded(full), some_tokens()
    updates = adapter_updates(model)
    generator, ranked = torch.Generator().manual_seed(1), []
    for update in updates:
        sizes = update.parts().num_parameters
        scores = tuple(torch.rand(len(sizes), generator=generator).tolist())
        module = RankedModule.of(update.module, 0.0)
        own = {"part_scores": scores, "part_parameters": sizes}
        ranked.append(replace(module, **own, has_magnitude_part="use_dora" in options))
    selection = Ranking(tuple(ranked), "by hand", "part").select(0.3)
    pruned = [update.module.name for update in updates if update.module.name not in selection.names]
    prune_adapter(str(full), cut, model, pruned, selection)
    kept = {part_name(name, index) for name, own in selection.parts.items() for index in own}
    with gated(model, updates, initial_score=0.0, link="identity", granularity="part") as gates:
        gates.set_scores(torch.tensor([float(name in kept) for name in gates.groups]))
        with torch.no_grad():
            expected = float(token_loss(model, tokens))
    after = loaded(cut)
    with torch.no_grad():
        found = float(token_loss(after, tokens))
        after.merge_adapter()
        merged = float(token_loss(after, tokens))
    tolerance = 1e-9 if dtype == torch.float64 else 0.02
    assert found == pytest.approx(expected, rel=tolerance)
    if make is not tiny_gpt2:  # whose head is tied to a merged embedding
        assert merged == pytest.approx(found, rel=1e-9)
    stored = load_file(cut / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    config = json.loads((cut / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"]) == ("LORA", config["r"])
    num_saved = sum(value.numel() for name, value in stored.items() if "lora_" in name)
    assert num_saved == selection.num_parameters


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


def test_a_difference_of_checkpoints_becomes_a_small_adapter(tiny, tmp_path):
    out, own = tmp_path / "out", ("--model", tiny / "model", "--tuned", tiny / "tuned")
    own = (*own, "--data", tiny / "data.jsonl", "--lora-rank", "12")
    code, said, err = printed("extract", *own, "--budget", "0.5x-params", "--output", out)
    assert code == 0, err
    base, tuned = weights_in(tiny / "model"), weights_in(tiny / "tuned")
    adapter, cut = weights_in(out / "adapter"), weights_in(out / "pruned")
    name = "model.layers.0.mlp.up_proj"
    left, values, right = torch.linalg.svd(
        (tuned[f"{name}.weight"] - base[f"{name}.weight"]).float()
    )
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "AB")
    rank = min(12, len(values))
    expected = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(b @ a, expected, rtol=0.02, atol=float(values[0]) / 100)
    found = record_of(out / "pruned")["result"]
    size = sum(value.numel() for value in cut.values())
    assert found["pruned"]["num_parameters"] == size
    assert size <= 0.5 * sum(value.numel() for value in adapter.values())
    assert "other weights that differ" in err
    assert f"adapter written to {out / 'pruned'}" in said.replace("\n", "")
    # the ranking cuts again, and a budget in MiB is what the file takes
    again = tmp_path / "again"
    assert keylayers("prune", "--ranking", out, "--budget", "0.02MiB", "--output", again) == 0
    assert size_of(again) <= 0.02 * 2**20


def size_of(folder):
    return (folder / "adapter_model.safetensors").stat().st_size


def difference_in(name, value):
    """A change of the tuned checkpoint: a weight gets this value in one place."""

    def change(model):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] = value

    return change


NOTHING_TO_EXTRACT = [
    (["--lora-rank", "2"], None, "exactly one of `budget` .* and `max_loss` .*, got neither"),
    (["--budget", "3", "--max-loss", "1"], None, "exactly one of `budget` .*, got both"),
    (["--budget", "auto"], None, "`budget` must be of parts, .* got auto"),
    (["--budget", "0.5x-time"], None, "`budget` must be of parts, .* got 0.5x-time"),
    (["--budget", "3"], difference_in("model.norm.weight", 7.0), "but every module is equal"),
    (
        ["--budget", "3"],
        difference_in("model.layers.1.self_attn.q_proj.bias", 7.0),
        "in a weight matrix of the model's blocks, but only biases differ",
    ),
    (
        ["--budget", "3"],
        difference_in("model.layers.1.mlp.up_proj.weight", float("nan")),
        r"must be finite, but that of model\.layers\.1\.mlp\.up_proj is not",
    ),
]


@pytest.mark.parametrize(("options", "change", "message"), NOTHING_TO_EXTRACT)
def test_what_cannot_be_extracted_is_refused(tiny, tmp_path, options, change, message):
    model = LlamaForCausalLM.from_pretrained(tiny / "model")
    model.config.attention_bias = True
    biased = LlamaForCausalLM(model.config)
    biased.load_state_dict(model.state_dict(), strict=False)
    for name in ("model", "tuned"):
        biased.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / name)
        if change is not None:
            change(biased)
    own = ("--model", tmp_path / "model", "--tuned", tmp_path / "tuned")
    own = (*own, "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    code, _, err = printed("extract", *own, *options)
    assert code == 2, err
    assert re.search(message, complaint_in(err))
    assert not (tmp_path / "out" / "adapter").exists()


def test_no_adapter_is_extracted_from_stacked_experts(tiny, tmp_path):
    write_mixture(tiny, tmp_path)
    model, output = tmp_path / "model", tmp_path / "out"
    own = ("--model", model, "--tuned", model, "--data", tmp_path / "data.jsonl")
    code, _, err = printed("extract", *own, "--budget", "3", "--output", output)
    assert (code, "stacks those of several experts" in complaint_in(err)) == (2, True)


@pytest.fixture(scope="module")
def ranked_parts(tiny, ranked, once):
    """A ranking of rank-one parts of the adapter of another ranking's stage 1."""
    own = ("--adapter", ranked / "adapter", "--granularity", "part", "--method", "fisher-pruning")
    return once("ranked_parts", lambda folder: rank(tiny, folder, *own))


def test_prune_cuts_to_parts_and_says_what_it_costs(ranked_parts, tmp_path):
    ranking, cut = Ranking.load(ranked_parts), tmp_path / "cut"
    code, out, err = printed(
        "prune", "--ranking", ranked_parts, "--budget", "0.4x-params", "--output", cut
    )
    assert code == 0, err
    selection = ranking.select("0.4x-params")
    assert set(fresh_process(PLAIN_PEFT, cut)) == set(selection.names)
    made = record_of(cut)
    assert made["selection"]["lora_ranks"] == selection.ranks
    found = made["result"]
    assert found["pruned"]["num_parameters"] == selection.num_parameters
    assert found["pruned"]["num_parts"] == sum(selection.ranks.values())
    assert found["full"]["num_parts"] == len(parts_in_order(ranking.modules))
    assert f"{found['pruned']['num_parts']} of {found['full']['num_parts']} rank-one parts" in out


def test_prune_keeps_the_fewest_parts_within_a_loss(ranked_parts, ranked, tmp_path):
    padded = ("--pad-ranks", "3")
    runs = ((ranked_parts, "rank-one parts", padded), (ranked, "modules", ()))
    for ranking, what, more in runs:
        cut = tmp_path / what
        wanted = ("--ranking", ranking, "--max-loss", "0.05", *more, "--output", cut)
        code, _, err = printed("prune", *wanted)
        assert code == 0, err
        found = record_of(cut)["result"]
        assert found["pruned_loss_nats"] - found["full_loss_nats"] <= 0.05
        (said,) = re.findall(rf"(\d+) of \d+ {what} are enough", err)
        assert int(said) == found["pruned"].get("num_parts", found["pruned"]["num_modules"])
        assert "with 95 % confidence" in err
    wanted = ("--ranking", ranked_parts, "--max-loss", "0.05", "--output", tmp_path / "one")
    code, _, err = printed("prune", *wanted, "--held-out", "1")
    assert (code, "with unknown certainty, from a single held-out batch" in err) == (0, True)
    code, _, err = printed("prune", "--ranking", ranked, "--max-loss", "0.05", "--budget", "0.3")
    assert code == 2
    assert "exactly one of `budget`, `freeze` and `max_loss` must be given" in complaint_in(err)
    code, _, err = printed("prune", "--ranking", ranked, "--budget", "0.3", "--pad-ranks", "8")
    assert code == 2
    assert "rank with `granularity` part" in complaint_in(err)


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


def test_a_cut_adapter_can_be_healed(ranked, ranked_parts, ranked_full, tmp_path):
    losses = {}
    for steps in (0, 12):
        wanted = (
            "--budget",
            "0.1x-params",
            "--heal-steps",
            steps,
            "--output",
            tmp_path / f"{steps}",
        )
        code, said, err = printed("prune", "--ranking", ranked_parts, *wanted)
        assert code == 0, err
        losses[steps] = record_of(tmp_path / f"{steps}")["result"]
    plain, healed = losses.values()
    assert "healed_loss_nats" not in plain
    assert healed["pruned_loss_nats"] == plain["pruned_loss_nats"]
    assert healed["healed_loss_nats"] < healed["pruned_loss_nats"]
    assert f"{healed['healed_loss_nats']:.4f}" in said
    before, after = (weights_in(tmp_path / f"{steps}") for steps in losses)
    assert {name: (v.shape, v.dtype) for name, v in before.items()} == {
        name: (v.shape, v.dtype) for name, v in after.items()
    }
    code, _, err = printed("prune", "--ranking", ranked_full, "--budget", "0.3", "--heal-steps", 2)
    assert (code, "it trains the LoRA matrices of an adapter" in complaint_in(err)) == (2, True)


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


KEPT_WHOLE = {"r": 4, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture(scope="module")
def ranked_bfloat16(tiny, once):
    """A ranking of the parts of a bfloat16 adapter that saves the head, used in float32."""

    def write(folder):
        base = LlamaForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
        torch.manual_seed(0)
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **KEPT_WHOLE))
        add_noise(made, 0.3, "lora_B")
        made.to(torch.bfloat16).save_pretrained(folder / "adapter")
        own = ("--adapter", folder / "adapter", "--granularity", "part")
        return rank(tiny, folder, *own, "--method", "fisher-pruning")

    return once("ranked_bfloat16", write)


def test_a_bfloat16_adapter_is_cut_although_its_parts_are_rounded(ranked_bfloat16, tmp_path):
    wanted = ("--ranking", ranked_bfloat16, "--budget", "0.5x-params", "--output", tmp_path / "cut")
    code, _, err = printed("prune", *wanted)
    assert code == 0, err
    assert {value.dtype for value in weights_in(tmp_path / "cut").values()} == {torch.bfloat16}


def test_a_budget_on_disk_counts_what_is_always_kept(ranked_bfloat16, tmp_path):
    full = size_of(ranked_bfloat16 / "adapter")
    head = weights_in(ranked_bfloat16 / "adapter")["base_model.model.lm_head.weight"]
    allowed = (full + head.numel() * head.element_size()) / 2 / 2**20
    wanted = ("--ranking", ranked_bfloat16, "--output", tmp_path / "cut")
    code, _, err = printed("prune", *wanted, "--budget", f"{allowed}MiB")
    assert code == 0, err
    assert 0.8 * allowed * 2**20 <= size_of(tmp_path / "cut") <= allowed * 2**20
    assert record_of(tmp_path / "cut")["selection"]["budget"] == f"{allowed}MiB"
    code, _, err = printed("prune", *wanted, "--budget", "0.01MiB")
    assert (code, "more than what the adapter holds besides rank-one parts" in err) == (2, True)


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
