# SPDX-License-Identifier: Apache-2.0
"""Small adapters: cut to rank-one parts, extracted from checkpoints, healed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, T5Config

from commands import (
    EXPERTS_OF_PLAIN_PEFT,
    PLAIN_PEFT,
    complaint_in,
    fresh_process,
    keylayers,
    printed,
    rank,
    record_of,
    weights_in,
)
from keylayers.apply.prune import prune_adapter
from keylayers.gates import gated, part_name
from keylayers.model.modules import map_modules
from keylayers.ranking.parts import parts_in_order
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.updates import adapter_updates
from tiny_files import add_noise, write_mixture

from tiny_models import (
    TinyExperts,
    in_float64,
    some_tokens,
    tiny_gpt2,
    tiny_llama,
    token_loss,
    with_random_lora,
)

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
    made = with_random_lora(in_float64(make()), kind, **options)
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
        sizes = update.parts.num_parameters
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
    (["--lora-rank", "2"], None, "exactly one of `budget` .* and `max_loss` .*, got none"),
    (["--budget", "3", "--max-loss", "1"], None, "one of `budget` .*, got budget and max_loss"),
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


def test_an_adapter_is_extracted_from_stacked_experts(tiny, tmp_path):
    write_mixture(tiny, tmp_path)
    model, tuned, output = (tmp_path / name for name in ("model", "tuned", "out"))
    mixture = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    names = [info.name for info in map_modules(mixture)]
    add_noise(mixture, 0.05, "layers.1.self_attn.q_proj", "layers.1.mlp.experts")
    for part in (mixture, AutoTokenizer.from_pretrained(model)):
        part.save_pretrained(tuned)
    own = ("--model", model, "--tuned", tuned, "--data", tmp_path / "data.jsonl")
    own = (*own, "--lora-rank", "64", "--mask-batches", "1", "--dtype", "float32")
    own = (*own, "--output", output)
    code, _, err = printed("extract", *own, "--budget", "0.3x-params")
    assert code == 0, err
    assert "holds 100.0% of the squared difference" in err
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), output / "adapter"
    ).merge_and_unload()
    for name in names:
        weights = [
            found.get_parameter(name) if "experts" in name else found.get_submodule(name).weight
            for found in (merged, mixture)
        ]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    cut, whole = record_of(output / "pruned")["result"], weights_in(output / "adapter")
    size = sum(value.numel() for value in whole.values())
    assert 0 < cut["pruned"]["num_parameters"] <= 0.3 * size
    kept = [name for name in cut["modules"] if ".experts." in name]
    experts = sorted(name.rpartition(".")[2] for name in kept)
    assert fresh_process(EXPERTS_OF_PLAIN_PEFT, output / "pruned") == experts


def test_a_base_that_is_not_causal_is_one_line(tiny, tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    own = ("--tuned", tiny / "tuned", "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    code, _, err = printed("extract", "--model", tmp_path / "t5", *own, "--budget", "3")
    assert (code, "must be a causal language model" in complaint_in(err)) == (2, True)


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
    assert "`max_loss` (such as 0.01 nats) must be given, got budget and" in complaint_in(err)
    code, _, err = printed("prune", "--ranking", ranked, "--budget", "0.3", "--pad-ranks", "8")
    assert code == 2
    assert "rank with `granularity` part" in complaint_in(err)


def test_a_cut_adapter_can_be_healed(ranked, ranked_parts, ranked_full, tmp_path):
    cut = ("prune", "--ranking", ranked_parts, "--budget", "0.1x-params")
    heal = ("--heal-steps", 12)
    results = []
    for name, wanted in (
        ("plain", ()),
        ("healed", heal),
        ("slowly", (*heal, "--heal-learning-rate", 1e-6)),
    ):
        code, said, err = printed(*cut, *wanted, "--output", tmp_path / name)
        assert code == 0, err
        results.append(record_of(tmp_path / name)["result"])
        if name != "plain":
            assert f"{results[-1]['healed_loss_nats']:.4f}" in said
    plain, healed, slowly = results
    assert "healed_loss_nats" not in plain
    assert healed["pruned_loss_nats"] == plain["pruned_loss_nats"]
    gain = plain["pruned_loss_nats"] - healed["healed_loss_nats"]
    assert gain > 0
    assert abs(plain["pruned_loss_nats"] - slowly["healed_loss_nats"]) < gain / 10
    before, after = (weights_in(tmp_path / name) for name in ("plain", "healed"))
    assert {name: (v.shape, v.dtype) for name, v in before.items()} == {
        name: (v.shape, v.dtype) for name, v in after.items()
    }
    code, _, err = printed("prune", "--ranking", ranked_full, "--budget", "0.3", "--heal-steps", 2)
    assert (code, "it trains the LoRA matrices of an adapter" in complaint_in(err)) == (2, True)
    code, _, err = printed(*cut, "--heal-learning-rate", 1e-3)
    assert (code, "left out without `heal_steps`" in complaint_in(err)) == (2, True)


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
