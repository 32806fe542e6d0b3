# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from keylayers.errors import GuardError, ModelError
from keylayers.gates import gated
from keylayers.model.preserve import preserved
from keylayers.updates import adapter_updates, dense_updates

from tiny_models import TinyExperts, in_float64, some_tokens, tiny_gpt2, tiny_llama, token_loss

EPSILON = 1e-5


def with_random_lora(model, config=None, **options):
    """`model` with an adapter whose parameters are random; magnitudes grow by up to a third."""
    options.setdefault("target_modules", "all-linear")
    tuned = get_peft_model(model, config or LoraConfig(r=3, **options))
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name and "ranknum" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned


def with_random_difference(model):
    """A base model and, by name, weights that differ from it everywhere."""
    torch.manual_seed(4)
    tuned = {
        name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()
    }
    return model, tuned


def llama():
    return in_float64(tiny_llama())


def gpt2():
    return in_float64(tiny_gpt2())


ADAPTERS = {
    "lora": lambda: with_random_lora(llama()),
    "rslora": lambda: with_random_lora(llama(), use_rslora=True),
    "lora on Conv1D": lambda: with_random_lora(gpt2(), fan_in_fan_out=True),
    "dora": lambda: with_random_lora(llama(), use_dora=True),
    "dora on Conv1D": lambda: with_random_lora(gpt2(), use_dora=True, fan_in_fan_out=True),
    "adalora": lambda: with_random_lora(
        llama(), AdaLoraConfig(init_r=3, total_step=10, target_modules="all-linear")
    ),
    "lora on embeddings": lambda: with_random_lora(
        llama(), target_modules=["embed_tokens", "q_proj", "lm_head"]
    ),
    "lora on both embeddings of GPT-2": lambda: with_random_lora(
        gpt2(), target_modules=["wte", "wpe", "c_attn"], fan_in_fan_out=True
    ),
    "lora on experts": lambda: with_random_lora(
        TinyExperts().double(),
        target_modules=["mix"],
        target_parameters=["experts.up_proj", "experts.down_proj"],
    ),
    "lora on the weight of a linear layer": lambda: with_random_lora(
        TinyExperts().double(), target_modules=["lm_head"], target_parameters=["mix.weight"]
    ),
}
DIFFERENCES = {
    "difference with biases": lambda: in_float64(tiny_llama(attention_bias=True)),
    "difference on Conv1D": gpt2,
    "difference on experts": lambda: TinyExperts().double(),
}


def updates_of(kind):
    if kind in ADAPTERS:
        model = ADAPTERS[kind]()
        return model, adapter_updates(model)
    model, tuned = with_random_difference(DIFFERENCES[kind]())
    return model, dense_updates(model, tuned)


KINDS = [*ADAPTERS, *DIFFERENCES]


SHARED = [(kind, shared) for kind in ("lora", *DIFFERENCES) for shared in ("block", "projection")]


@pytest.mark.parametrize(("kind", "granularity"), [*((kind, "module") for kind in KINDS), *SHARED])
def test_gate_gradients_agree_with_finite_differences(kind, granularity):
    model, updates = updates_of(kind)
    tokens = some_tokens()
    with gated(model, updates, initial_score=0.7, granularity=granularity) as gates:
        token_loss(model, tokens).backward()
        gradient = gates.gradient()
        scores = gates.scores()
        differences = torch.zeros_like(gradient)
        with torch.no_grad():
            for index in range(len(gates)):
                step = torch.zeros_like(scores)
                step[index] = EPSILON
                gates.set_scores(scores + step)
                above = token_loss(model, tokens)
                gates.set_scores(scores - step)
                differences[index] = (above - token_loss(model, tokens)) / (2 * EPSILON)
    assert gradient.dtype == torch.float64
    scale = differences.abs().max()
    assert scale > 1e-4
    assert float((gradient - differences).abs().max() / scale) < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "adalora"])
def test_a_second_adapter_is_not_gated_and_switching_thaws_nothing(kind):
    """As trainers with a reference do it; AdaLoRA allows one adapter."""

    model, updates = updates_of(kind)
    model.add_adapter("ref", model.peft_config["default"])
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".ref" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = some_tokens()
    model.set_adapter("ref")
    expected = token_loss(model, tokens).detach()
    model.set_adapter("default")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with gated(model, updates, initial_score=0.3, link="identity") as gates:
        gated_loss = token_loss(model, tokens).detach()
        model.set_adapter("ref")
        assert torch.equal(token_loss(model, tokens), expected)
        model.set_adapter("default")
        with model.disable_adapter():
            token_loss(model, tokens)
        loss = token_loss(model, tokens)
        assert torch.equal(loss, gated_loss)
        loss.backward()
        gates.gradient()
        gates.check_alone()
        trainable = [one for one in model.parameters() if one.requires_grad]
        assert {id(one) for one in trainable} <= {id(one) for one in gates.parameters()}
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_are_the_tuned_model_and_closed_gates_the_base(kind):
    model, updates = updates_of(kind)
    tokens = some_tokens()
    with torch.no_grad():
        if kind in ADAPTERS:
            open_loss = token_loss(model, tokens)
            with model.disable_adapter():
                closed_loss = token_loss(model, tokens)
        else:
            closed_loss = token_loss(model, tokens)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            ranked = [update.module.name + "." for update in updates]
            for name, parameter in model.named_parameters():
                if f"{name}.".startswith(tuple(ranked)):
                    parameter.copy_(updates[0].tuned[name])
            open_loss = token_loss(model, tokens)
            model.load_state_dict(before)
        with gated(model, updates, initial_score=1.0, link="identity"):
            assert float(token_loss(model, tokens)) == pytest.approx(float(open_loss), rel=1e-12)
        with gated(model, updates, initial_score=0.0, link="identity"):
            assert float(token_loss(model, tokens)) == pytest.approx(float(closed_loss), rel=1e-12)
    assert abs(float(open_loss) - float(closed_loss)) > 1e-3


def state_of(model):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "children": [name for name, _ in model.named_modules()],
        "hooks": [
            (name, list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        "own attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [
            None if parameter.grad is None else parameter.grad.clone()
            for parameter in model.parameters()
        ],
        "modes": [module.training for module in model.modules()],
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in ("children", "hooks", "own attributes", "flags", "modes", "random"):
        assert first[name] == second[name], name
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    for mine, other in zip(first["gradients"], second["gradients"], strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_leave_no_trace(kind):
    model, updates = updates_of(kind)
    model.train()
    next(model.children()).eval()
    token_loss(model, some_tokens()).backward()  # gradients that must come back
    before = state_of(model)
    with gated(model, updates, initial_score=2.0) as gates:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in gates.parameters()}
        model.eval()
        token_loss(model, some_tokens(seed=2)).backward()
        torch.rand(3)
        np.random.rand(3)
    assert_same(before, state_of(model))


def test_pythons_random_state_is_restored_too():
    # on its own, because the shape checks of the other functions draw from it while tests run

    model = tiny_llama()
    before = random.getstate()
    with preserved(model):
        random.random()
    assert random.getstate() == before


def test_gates_leave_no_trace_when_the_block_fails():
    model, updates = updates_of("lora")
    before = state_of(model)
    with pytest.raises(KeyError), gated(model, updates, initial_score=2.0):
        raise KeyError
    assert_same(before, state_of(model))


def test_a_weight_that_changes_while_gates_are_in_is_reported():
    model, updates = updates_of("lora")
    with (
        pytest.raises(GuardError, match=r"weights .* must not change .* first .*embed_tokens"),
        gated(model, updates, initial_score=2.0),
        torch.no_grad(),
    ):
        model.get_input_embeddings().weight[0, 0] += 1


def test_a_gate_that_takes_no_part_is_reported():
    model, updates = updates_of("lora")
    silent = pytest.raises(GuardError, match=r"must take part in the loss, but 14 of 14 did not")
    with gated(model, updates, initial_score=2.0) as gates, silent:
        gates.gradient()


REFUSED = [
    ({"use_dora": True, "target_modules": ["wte", "c_attn"]}, "DoRA on embeddings"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "biases of the base that are trained in place .`bias` all."),
    ({"bias": "lora_only"}, "biases of the base that are trained in place .`bias` lora_only."),
]


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_updates_that_a_gate_cannot_scale_exactly_are_refused(options, reason):
    with pytest.raises(ModelError, match=rf"a gate must scale the whole update.*{reason}"):
        adapter_updates(with_random_lora(tiny_gpt2(), fan_in_fan_out=True, **options))


def test_merged_adapters_and_plain_models_are_refused():
    model = with_random_lora(tiny_llama())
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged into the base weights"):
        adapter_updates(model)
    with pytest.raises(ModelError, match="must carry a PEFT adapter"):
        adapter_updates(tiny_llama())


def test_training_biases_is_no_matter_where_there_are_none():
    assert len(adapter_updates(with_random_lora(tiny_llama(), bias="all"))) == 14


def test_checkpoints_of_different_shapes_are_refused():
    model = tiny_llama()
    tuned = dict(model.state_dict())
    with pytest.raises(ModelError, match="must differ from the base"):
        dense_updates(model, tuned)
    tuned["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 16)
    with pytest.raises(
        ModelError, match=r"up_proj.weight is \(24, 16\) in the model and \(5, 16\)"
    ):
        dense_updates(model, tuned)
    del tuned["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"must hold model.layers.1.mlp.up_proj.weight"):
        dense_updates(model, tuned)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_whole_update_is_what_merging_adds_to_the_weight(kind):
    model, updates = updates_of(kind)
    before = [weight_of(update).clone() for update in updates]
    deltas = [update.delta() for update in updates]
    model.merge_adapter()
    for update, weight, delta in zip(updates, before, deltas, strict=True):
        merged = weight_of(update) - weight
        assert delta.shape == update.module.shape
        if delta.shape != merged.shape or "Conv1D" in kind or "GPT-2" in kind:
            is_transposed = not isinstance(update.layer.get_base_layer(), torch.nn.Embedding)
            merged = merged.T if is_transposed else merged
        torch.testing.assert_close(delta, merged.float(), rtol=1e-4, atol=1e-5)


def weight_of(update):
    layer = update.layer.get_base_layer()
    name = update.module.name.rpartition(".")[2] if update.module.is_stacked else "weight"
    return layer.get_parameter(name).detach()


def test_lora_dropout_is_off_while_gates_are_in():
    model = with_random_lora(tiny_llama(), lora_dropout=0.5).train()
    tokens = some_tokens()
    with gated(model, adapter_updates(model), initial_score=1.0), torch.no_grad():
        assert torch.equal(token_loss(model, tokens), token_loss(model, tokens))
    with torch.no_grad():
        assert not torch.equal(token_loss(model, tokens), token_loss(model, tokens))
