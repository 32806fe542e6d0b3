# SPDX-License-Identifier: Apache-2.0
"""What pruning does to files: what is kept keeps its bits, whatever kind of adapter or shards."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from commands import weights_in
from keylayers.apply import prune as module
from keylayers.apply.prune import kept_tensors, prune_adapter, prune_checkpoint, pruned_config
from keylayers.errors import GuardError, ModelError
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.options import ModelOptions
from keylayers.ranking.targets import target_regex

from tiny_models import some_tokens, tiny_gpt2, tiny_llama

Q0, V0, DOWN1 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
)
ALL = (Q0, V0, DOWN1, "model.layers.1.self_attn.q_proj")
KEPT = (V0, DOWN1)
HEAD = "base_model.model.lm_head.weight"


def save_adapter(folder, names=ALL, make=tiny_llama, dtype=torch.float32, **options):
    """An adapter whose every matrix is far from zero, on exactly `names`."""
    config = LoraConfig(**{"r": 2, "target_modules": target_regex(names)} | options)
    adapted = get_peft_model(make(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.to(dtype).save_pretrained(folder)


def prune(source, folder, kept=KEPT, names=ALL, make=tiny_llama, model=None):
    folder.mkdir()
    model = model or PeftModel.from_pretrained(make(), source)
    prune_adapter(str(source), folder, model, [name for name in names if name not in kept])


def owners(folder, names):
    """Modules of an adapter file; tensors that belong to none of `names` by their own names."""
    return {
        next((module for module in names if name.startswith(f"base_model.model.{module}.")), name)
        for name in weights_in(folder)
    }


def logits(folder, make, without=()):
    """Plain PEFT's adapter, and its logits with the update of some modules taken out."""
    tuned = PeftModel.from_pretrained(make(), folder).eval()
    targets = set(tuned.targeted_module_names)
    for name in without:
        parent, _, child = name.rpartition(".")
        layer = tuned.get_base_model().get_submodule(name)
        setattr(tuned.get_base_model().get_submodule(parent), child, layer.get_base_layer())
    with torch.no_grad():
        return targets, tuned(input_ids=some_tokens()).logits


GPT2 = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.wte")
OWN_RANKS = {"rank_pattern": {V0: 4, Q0: 3}, "alpha_pattern": {"down_proj": 7, "q_proj": 5}}
BLOCK_0 = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]}
# kind of adapter: options of its config, tensors outside the blocks, modules, kept ones, model
KINDS = {
    "LoRA": ({}, (), ALL, KEPT, tiny_llama),
    "rsLoRA": ({"use_rslora": True}, (), ALL, KEPT, tiny_llama),
    "DoRA": ({"use_dora": True}, (), ALL, KEPT, tiny_llama),
    "bfloat16": ({"dtype": torch.bfloat16}, (), ALL, KEPT, tiny_llama),
    "own ranks and alphas": (OWN_RANKS, (), ALL, KEPT, tiny_llama),
    "saved whole": ({"modules_to_save": ["lm_head"]}, [HEAD], ALL, KEPT, tiny_llama),
    "layers_to_transform": (BLOCK_0, (), [Q0, V0], [V0], tiny_llama),
    "Conv1D and embedding": ({"fan_in_fan_out": True}, (), GPT2, GPT2[1:], tiny_gpt2),
}


@pytest.mark.parametrize(("options", "outside", "names", "kept", "make"), KINDS.values(), ids=KINDS)
def test_the_pruned_adapter_is_the_full_one_without_the_other_modules(
    tmp_path, options, outside, names, kept, make
):
    full, cut = tmp_path / "full", tmp_path / "cut"
    save_adapter(full, names, make, **options)
    prune(full, cut, kept, names, make)
    assert owners(full, names) == {*names, *outside}
    assert owners(cut, names) == {*kept, *outside}
    before, after = weights_in(full), weights_in(cut)
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    targets, found = logits(cut, make)
    assert targets == set(kept)
    assert torch.equal(found, logits(full, make, without=set(names) - set(kept))[1])
    assert not torch.allclose(found, logits(full, make)[1], atol=1e-3)


def test_all_else_of_the_config_is_kept(tmp_path):
    options = {
        **{"task_type": "CAUSAL_LM", "lora_alpha": 5, "lora_dropout": 0.1, "use_rslora": True},
        **{"revision": "abc", "exclude_modules": ["lm_head"]},
        "rank_pattern": {V0: 4, Q0: 3, "layers.1.self_attn.q_proj": 1},
        "alpha_pattern": {"q_proj": 5, r"layers\.[01]\.mlp\.down_proj": 7},
    }
    save_adapter(tmp_path / "full", **options)
    prune(tmp_path / "full", tmp_path / "cut")
    before, after = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("full", "cut")
    )
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys()
    assert changed == {"target_modules", "rank_pattern", "alpha_pattern"}
    assert after["rank_pattern"] == {V0: 4}
    assert after["alpha_pattern"] == {r"layers\.[01]\.mlp\.down_proj": 7}


def test_an_entry_of_adaloras_ranks_goes_with_its_module():
    ranks = {f"{name}.lora_E": [True, False] for name in (V0, Q0)}
    changed = pruned_config({"rank_pattern": ranks, "r": 8}, [V0])
    assert changed == {
        "rank_pattern": {f"{V0}.lora_E": [True, False]},
        "r": 8,
        "target_modules": V0.replace(".", r"\."),
    }
    assert pruned_config({"rank_pattern": None}, [V0])["rank_pattern"] is None


def test_layers_that_peft_nests_move_up_when_an_outer_one_goes():
    paths = {
        "experts.down": "experts",
        "experts.gate": "experts.base_layer",
        "experts.up": "experts.base_layer.base_layer",
        "router": "router",
    }
    names = [f"base_model.model.{path}.lora_A.weight" for path in paths.values()]
    names.append("base_model.model.score.weight")  # saved whole, not a part of any module
    found = kept_tensors(names, paths, ["experts.gate", "router"])
    assert found == {names[0]: names[0], names[2]: names[1], names[4]: names[4]}
    assert kept_tensors(names, paths, ["experts.down"])[names[1]] == names[0]


def test_an_adapter_without_the_names_of_its_modules_is_refused(tmp_path):
    save_adapter(tmp_path / "full")
    path = tmp_path / "full" / "adapter_model.safetensors"
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "full")
    save_file(
        {name.replace("down_proj", "w2"): value for name, value in load_file(path).items()}, path
    )
    with pytest.raises(ModelError, match=r"must have the names.*down_proj has none"):
        prune(tmp_path / "full", tmp_path / "cut", model=model)
    assert list((tmp_path / "cut").iterdir()) == []


PRUNED = [Q0, DOWN1]
RESTORED = {f"{Q0}.weight", f"{Q0}.bias", f"{DOWN1}.weight"}


def checkpoints(folder, base=torch.float32, shard="2KB"):
    """A base checkpoint and a tuned one in bfloat16 in which every tensor differs."""
    model = tiny_llama(attention_bias=True)
    model.to(base).save_pretrained(folder / "base", max_shard_size=shard)
    model = tiny_llama(attention_bias=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder / "tuned", max_shard_size=shard)


def restore(folder):
    """The tuned checkpoint with the base's values in PRUNED; written, base, tuned."""
    (folder / "cut").mkdir()
    base = ModelOptions(model=str(folder / "base"))
    model, tuned = tiny_llama(attention_bias=True), str(folder / "tuned")
    tuned, restored = prune_checkpoint(model, tuned, base, folder / "cut", PRUNED)
    assert set(restored) == RESTORED
    return Checkpoint.open(ModelOptions(model=str(folder / "cut"))), Checkpoint.open(base), tuned


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_pruned_modules_get_the_bases_weights_back(tmp_path, base_dtype):
    checkpoints(tmp_path, base=base_dtype)
    written, base, tuned = restore(tmp_path)
    assert len(set(tuned.files.values())) > 3
    shards = {name: path.name for name, path in tuned.files.items()}
    assert {name: path.name for name, path in written.files.items()} == shards
    assert {written[name].dtype for name in written} == {torch.bfloat16}
    from_base = {n for n in written if torch.equal(written[n], base[n].to(torch.bfloat16))}
    from_tuned = {n for n in written if torch.equal(written[n], tuned[n])}
    assert from_base == RESTORED
    assert from_tuned == set(tuned) - RESTORED


def test_a_base_without_the_models_prefix_in_its_names_is_found(tmp_path):
    checkpoints(tmp_path, shard="10MB")
    written = dict(restore(tmp_path)[0])
    file = tmp_path / "base" / "model.safetensors"
    weights = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "cut")
    again = restore(tmp_path)[0]
    assert all(torch.equal(again[name], value) for name, value in written.items())


def _another_is_restored(path, values, write):
    write(path, [*values, ("model.norm.weight", torch.zeros(16, dtype=torch.bfloat16))])


def _a_tensor_is_lost(path, values, write):
    write(path, values)
    left = {name: value for name, value in load_file(path).items() if name != "model.norm.weight"}
    save_file(left, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [_another_is_restored, _a_tensor_is_lost])
def test_the_proof_of_a_pruned_checkpoint_can_fail(tmp_path, monkeypatch, damage):
    checkpoints(tmp_path, shard="1GB")
    write = module._overwrite
    monkeypatch.setattr(module, "_overwrite", lambda path, values: damage(path, values, write))
    with pytest.raises(GuardError, match=r"1 tensors differ, first model\.norm\.weight"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("instead", "message"),
    [
        ({}, f"the base must hold {Q0}.bias, but it does not"),
        ({f"{Q0}.bias": torch.zeros(3)}, r"q_proj.bias is \(16,\) in the model and \(3,\) in the"),
    ],
)
def test_a_base_that_lacks_a_tensor_or_has_another_shape_is_refused(tmp_path, instead, message):
    checkpoints(tmp_path, shard="1GB")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{Q0}.bias"]
    save_file(tensors | instead, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        restore(tmp_path)
