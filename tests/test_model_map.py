# SPDX-License-Identifier: Apache-2.0
"""Which modules a model has, what their weights hash to, and what is trained of them."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from keylayers.apply import trainable
from keylayers.errors import GuardError, ModelError
from keylayers.model.modules import map_modules
from keylayers.model.weights import weights_sha256
from keylayers.ranking.targets import target_regex

from tiny_models import tiny_gpt2, tiny_llama

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UP_PROJ = "model.layers.0.mlp.up_proj"


def test_a_llama_has_seven_modules_a_block_in_model_order():
    modules = map_modules(tiny_llama(3))
    assert [module.projection for module in modules] == PROJECTIONS * 3
    assert [module.block_index for module in modules] == sorted([0, 1, 2] * 7)
    assert modules[8].name == "model.layers.1.self_attn.k_proj"
    assert (modules[8].shape, modules[8].num_parameters) == ((8, 16), 128)
    with_bias = map_modules(tiny_llama(attention_bias=True))
    assert with_bias[8].num_parameters == 128 + 8


def test_names_that_repeat_in_a_block_are_told_apart():
    modules = map_modules(tiny_gpt2())
    kinds = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert [module.projection for module in modules[:4]] == kinds
    assert modules[0].shape == (48, 16)  # Conv1D keeps the transpose
    assert modules[0].num_parameters == 48 * 16 + 48


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_map_is_the_same_with_an_adapter_around_the_model(make):
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=make is tiny_gpt2)
    assert map_modules(get_peft_model(make(), config)) == map_modules(make())


def test_models_without_one_stack_of_blocks_are_refused():
    stacks = {name: nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]) for name in ("left", "right")}
    with pytest.raises(ModelError, match="but ModuleDict has 2: left, right"):
        map_modules(nn.ModuleDict(stacks))
    with pytest.raises(ModelError, match="but Linear has none"):
        map_modules(nn.Linear(2, 2))


def test_the_hash_of_weights_sees_the_base_model_alone():
    plain = weights_sha256(tiny_llama())
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear"))
    assert weights_sha256(wrapped) == plain
    half = tiny_llama().to(torch.bfloat16)
    assert weights_sha256(half) == weights_sha256(half.float())
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert weights_sha256(changed) != plain


NAMES = [f"model.layers.{block}.{kind}" for block in range(12) for kind in ("a.q_proj", "mlp.up")]


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_the_target_expression_matches_the_selection_and_nothing_else(selected):
    expression = target_regex([name for name in NAMES if name in selected])
    lures = [name.replace(".", "x") for name in NAMES] + [f"x.{name}" for name in NAMES]
    matched = {name for name in NAMES + lures if re.fullmatch(expression, name)}
    assert matched == selected


def test_the_target_expression_is_short():
    names = [f"model.layers.{block}.mlp.up_proj" for block in (5, 7)]
    names.append("model.layers.3.self_attn.q_proj")
    assert target_regex(names) == (r"model\.layers\.(?:(?:5|7)\.mlp\.up_proj|3\.self_attn\.q_proj)")
    assert target_regex(["lm_head"]) == "lm_head"


def test_a_trainable_set_that_is_not_the_selection_is_refused():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    model = trainable.add_lora(tiny_llama(), names, r=2)
    trainable.prove_trainable(model, names)
    with pytest.raises(ModelError, match=r"missed \['model.layers.0.mlp.no_proj'\]"):
        trainable.add_lora(tiny_llama(), [*names, "model.layers.0.mlp.no_proj"], r=2)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(GuardError, match=r"1 differ, first model.embed_tokens"):
        trainable.prove_trainable(model, names)


def test_full_training_of_a_selection_frees_exactly_it():
    model, name = tiny_llama(attention_bias=True), "model.layers.1.self_attn.v_proj"
    trainable.train_only(model, [name])
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {f"{name}.weight", f"{name}.bias"}
    with pytest.raises(ModelError, match="but lm_head is not"):
        trainable.train_only(model, ["lm_head"])


def test_an_adapter_on_a_conv1d_selection_warns_nobody():
    names = ["transformer.h.1.mlp.c_proj", "transformer.h.0.attn.c_attn"]
    model = trainable.add_lora(tiny_gpt2(), names, r=2)
    assert trainable.trainable_modules(model).keys() == set(names)


def test_weights_that_changed_outside_the_selection_are_reported():
    base = {name: value.clone() for name, value in tiny_llama().state_dict().items()}
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(UP_PROJ).weight += 1
    trainable.prove_unchanged_elsewhere(model, base, [UP_PROJ])
    with pytest.raises(GuardError, match=rf"1 others did, first {UP_PROJ}"):
        trainable.prove_unchanged_elsewhere(model, base, ["model.layers.1.mlp.up_proj"])
