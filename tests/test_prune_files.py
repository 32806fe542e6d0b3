# SPDX-License-Identifier: Apache-2.0
"""What pruning does to files: what is kept keeps its bits, whatever kind of adapter or shards."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tiny_models import some_tokens, tiny_gpt2, tiny_llama

Q0, V0, DOWN1 = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
)
ALL = (Q0, V0, DOWN1, "model.layers.1.self_attn.q_proj")
KEPT = (V0, DOWN1)


def save_adapter(folder, names=ALL, model=None, dtype=torch.float32, **options):
    """An adapter whose every matrix is far from zero, on exactly `names`."""
    from keylayers.ranking.targets import target_regex

    config = LoraConfig(r=2, target_modules=target_regex(names), **options)
    adapted = get_peft_model(model or tiny_llama(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.to(dtype).save_pretrained(folder)


def prune(source, folder, kept=KEPT, names=ALL):
    from keylayers.apply.prune import prune_adapter

    folder.mkdir()
    paths = {name: name for name in (*kept, *names)}
    pruned = [name for name in names if name not in kept]
    prune_adapter(source, folder, paths=paths, pruned=pruned)


def adapter_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def owners(folder, names=ALL):
    """Modules of an adapter file; tensors that belong to none of `names` by their own names."""
    return {
        next((one for one in names if name.startswith(f"base_model.model.{one}.")), name)
        for name in weights(folder)
    }


def silenced(source, pruned, model=None):
    """Logits of plain PEFT's full adapter with the update of the modules `pruned` taken out."""
    tuned = PeftModel.from_pretrained(model or tiny_llama(), source).eval()
    for name in pruned:
        parent, _, child = name.rpartition(".")
        layer = tuned.get_base_model().get_submodule(name)
        setattr(tuned.get_base_model().get_submodule(parent), child, layer.get_base_layer())
    with torch.no_grad():
        return tuned(input_ids=some_tokens()).logits


def logits(folder, model=None):
    tuned = PeftModel.from_pretrained(model or tiny_llama(), folder).eval()
    with torch.no_grad():
        return tuned, tuned(input_ids=some_tokens()).logits


# what kind of adapter, options of its config, tensors outside the blocks
KINDS = [
    ("LoRA", {}, set()),
    ("rsLoRA", {"use_rslora": True}, set()),
    ("DoRA", {"use_dora": True}, set()),
    ("stored in bfloat16", {"dtype": torch.bfloat16}, set()),
    (
        "ranks and alphas of their own",
        {"rank_pattern": {V0: 4, Q0: 3}, "alpha_pattern": {"down_proj": 7, "q_proj": 5}},
        set(),
    ),
    (
        "a module that is saved whole",
        {"modules_to_save": ["lm_head"]},
        {"base_model.model.lm_head.weight"},
    ),
]


@pytest.mark.parametrize(("options", "outside"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_the_pruned_adapter_is_the_full_one_without_the_other_modules(tmp_path, options, outside):
    save_adapter(tmp_path / "full", **options)
    prune(tmp_path / "full", tmp_path / "cut")
    assert owners(tmp_path / "full") == {*ALL, *outside}
    assert owners(tmp_path / "cut") == {*KEPT, *outside}
    before, after = weights(tmp_path / "full"), weights(tmp_path / "cut")
    assert all(value.dtype == before[name].dtype for name, value in after.items())
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    tuned, found = logits(tmp_path / "cut")
    assert set(tuned.targeted_module_names) == set(KEPT)
    assert torch.equal(found, silenced(tmp_path / "full", set(ALL) - set(KEPT)))
    assert not torch.allclose(found, logits(tmp_path / "full")[1], atol=1e-3)


def test_a_conv1d_model_and_a_module_outside_the_blocks(tmp_path):
    names = ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.wte")
    save_adapter(tmp_path / "full", names, tiny_gpt2(), fan_in_fan_out=True)
    prune(tmp_path / "full", tmp_path / "cut", kept=names[1:], names=names)
    tuned, found = logits(tmp_path / "cut", tiny_gpt2())
    assert set(tuned.targeted_module_names) == set(names[1:])
    assert torch.equal(found, silenced(tmp_path / "full", names[:1], tiny_gpt2()))


def test_all_else_of_the_config_is_kept(tmp_path):
    options = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "use_rslora": True,
        "revision": "abc",
        "exclude_modules": ["lm_head"],
        "rank_pattern": {V0: 4, Q0: 3, "layers.1.self_attn.q_proj": 1},
        "alpha_pattern": {"q_proj": 5, r"layers\.[01]\.mlp\.down_proj": 7},
    }
    save_adapter(tmp_path / "full", **options)
    prune(tmp_path / "full", tmp_path / "cut")
    before, after = adapter_config(tmp_path / "full"), adapter_config(tmp_path / "cut")
    changed = {key for key in before if before[key] != after[key]}
    assert before.keys() == after.keys()
    assert changed == {"target_modules", "rank_pattern", "alpha_pattern"}
    assert after["rank_pattern"] == {V0: 4}
    assert after["alpha_pattern"] == {r"layers\.[01]\.mlp\.down_proj": 7}
    assert (after["r"], after["lora_alpha"], after["use_rslora"]) == (2, 5, True)


def test_layers_to_transform_are_replaced_by_exact_targets(tmp_path):
    """PEFT refuses them beside a regular expression."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0])
    adapted = get_peft_model(tiny_llama(), config)
    adapted.save_pretrained(tmp_path / "full")
    prune(tmp_path / "full", tmp_path / "cut", kept=[V0], names=[Q0, V0])
    assert set(logits(tmp_path / "cut")[0].targeted_module_names) == {V0}


def test_an_entry_of_adaloras_ranks_goes_with_its_module():
    from keylayers.apply.prune import pruned_config

    ranks = {f"{name}.lora_E": [True, False] for name in (V0, Q0)}
    changed = pruned_config({"rank_pattern": ranks, "r": 8}, [V0])
    assert changed == {
        "rank_pattern": {f"{V0}.lora_E": [True, False]},
        "r": 8,
        "target_modules": V0.replace(".", r"\."),
    }
    assert pruned_config({"rank_pattern": None}, [V0])["rank_pattern"] is None


def test_layers_that_peft_nests_move_up_when_an_outer_one_goes():
    from keylayers.apply.prune import kept_tensors

    paths = {
        "experts.down": "experts",
        "experts.gate": "experts.base_layer",
        "experts.up": "experts.base_layer.base_layer",
        "router": "router",
    }
    names = [f"base_model.model.{path}.lora_A.weight" for path in paths.values()]
    names.append("base_model.model.score.weight")  # saved whole, beside the modules
    found = kept_tensors(names, paths, ["experts.gate", "router"])
    assert found == {names[0]: names[0], names[2]: names[1], names[4]: names[4]}
    assert kept_tensors(names, paths, ["experts.down"])[names[1]] == names[0]


# what the config says, what the line says
REFUSED = [
    ({"bias": "all"}, "also trained biases of the base .`bias` 'all'."),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights when it is loaded"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED, ids=[next(iter(c[0])) for c in REFUSED])
def test_an_adapter_whose_modules_do_not_stand_alone_is_refused(tmp_path, damage, message):
    from keylayers.errors import ModelError

    save_adapter(tmp_path / "full")
    config = adapter_config(tmp_path / "full") | damage
    (tmp_path / "full" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        prune(tmp_path / "full", tmp_path / "cut")
    assert list((tmp_path / "cut").iterdir()) == []


def test_weights_of_other_names_than_the_modules_are_refused(tmp_path):
    from keylayers.errors import ModelError

    save_adapter(tmp_path / "full")
    other = {
        name.replace("down_proj", "w2"): one for name, one in weights(tmp_path / "full").items()
    }
    save_file(other, tmp_path / "full" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"must have the names.*down_proj has none"):
        prune(tmp_path / "full", tmp_path / "cut")


def checkpoints(folder, *, base=torch.float32, tuned=torch.bfloat16, shard="2KB"):
    """A base checkpoint and a tuned one in which every tensor differs, both in shards."""
    model = tiny_llama(attention_bias=True)
    model.to(base).save_pretrained(folder / "base", max_shard_size=shard)
    model = tiny_llama(attention_bias=True)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(tuned).save_pretrained(folder / "tuned", max_shard_size=shard)


def opened(folder):
    from keylayers.model.loading import Checkpoint
    from keylayers.model.options import ModelOptions

    return Checkpoint.open(ModelOptions(model=str(folder)))


RESTORED = [f"{Q0}.weight", f"{Q0}.bias", f"{DOWN1}.weight"]


def restore(folder):
    """The tuned checkpoint with the base's values in RESTORED; written, base, tuned."""
    from keylayers.apply.restore import restore_modules
    from keylayers.apply.saving import copy_files

    (folder / "cut").mkdir()
    copy_files(folder / "tuned", folder / "cut", ["config.json"])
    base, tuned = opened(folder / "base"), opened(folder / "tuned")
    restore_modules(tuned.files, base, folder / "cut", restored=RESTORED)
    return opened(folder / "cut"), base, tuned


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
    assert from_base == set(RESTORED)
    assert from_tuned == set(tuned) - set(RESTORED)
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_one_shard_stays_one_file(tmp_path):
    checkpoints(tmp_path, shard="1GB")
    restore(tmp_path)
    files = {path.name for path in (tmp_path / "cut").iterdir()}
    assert files == {"config.json", "model.safetensors"}
    old = (tmp_path / "tuned" / "model.safetensors").stat().st_size
    assert (tmp_path / "cut" / "model.safetensors").stat().st_size == old


def test_the_proof_of_a_pruned_checkpoint_can_fail(tmp_path):
    from keylayers.apply.restore import prove_restored
    from keylayers.errors import GuardError

    checkpoints(tmp_path)
    written, base, tuned = restore(tmp_path)
    prove_restored(written, base, tuned, RESTORED)
    for wrong in (RESTORED[:-1], [*RESTORED, f"{V0}.weight"]):
        with pytest.raises(GuardError, match="1 tensors differ, first model"):
            prove_restored(written, base, tuned, wrong)
    fewer = {name: written[name] for name in written if name != "model.norm.weight"}
    with pytest.raises(GuardError, match=r"first model\.norm\.weight"):
        prove_restored(fewer, base, tuned, RESTORED)


def test_a_base_that_lacks_a_tensor_or_has_another_shape_is_refused(tmp_path):
    from keylayers.apply.restore import restore_modules
    from keylayers.errors import ModelError

    checkpoints(tmp_path)
    (tmp_path / "cut").mkdir()
    base, tuned = opened(tmp_path / "base"), opened(tmp_path / "tuned")
    fewer = {name: base[name] for name in base if name != f"{Q0}.bias"}
    with pytest.raises(ModelError, match=f"lacks {Q0}.bias"):
        restore_modules(tuned.files, fewer, tmp_path / "cut", restored=RESTORED)
    other = dict(fewer) | {f"{Q0}.bias": torch.zeros(3)}
    with pytest.raises(ModelError, match=r"q_proj.bias is \(3,\) in the base and \(16,\)"):
        restore_modules(tuned.files, other, tmp_path / "cut", restored=RESTORED)
