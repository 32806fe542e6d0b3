# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig
from transformers.pytorch_utils import Conv1D

from keylayers.errors import GuardError, ModelError
from keylayers.gates import gated
from keylayers.model.preserve import preserved
from keylayers.updates import adapter_updates, dense_updates
from scored import slopes

from tiny_models import (
    TinyExperts,
    in_float64,
    some_tokens,
    tiny_gpt2,
    tiny_llama,
    token_loss,
    unchanged,
    with_random_lora,
)

EMBEDDINGS = {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}
GPT2_EMBEDDINGS = {"target_modules": ["wte", "wpe", "c_attn"]}
EXPERTS = {"target_parameters": ["experts.up_proj", "experts.down_proj"]}
LINEAR_WEIGHT = {"target_modules": ["lm_head"], "target_parameters": ["mix.weight"]}
# Kind -> the model, and the options of its adapter; PEFT's AdaLoRA allows no second one.
ADAPTERS = {
    "lora": (tiny_llama, {}),
    "rslora": (tiny_llama, {"use_rslora": True}),
    "lora on Conv1D": (tiny_gpt2, {}),
    "dora": (tiny_llama, {"use_dora": True}),
    "dora on Conv1D": (tiny_gpt2, {"use_dora": True}),
    "lora on embeddings": (tiny_llama, EMBEDDINGS),
    "lora on both embeddings of GPT-2": (tiny_gpt2, GPT2_EMBEDDINGS),
    "lora on experts": (TinyExperts, {"target_modules": ["mix"], **EXPERTS}),
    "lora on the weight of a linear layer": (TinyExperts, LINEAR_WEIGHT),
    "adalora": (tiny_llama, {"kind": AdaLoraConfig, "r": 8, "init_r": 3, "total_step": 10}),
}
DIFFERENCES = {
    "difference with biases": lambda: tiny_llama(attention_bias=True),
    "difference on Conv1D": tiny_gpt2,
    "difference on experts": TinyExperts,
}
KINDS = [*ADAPTERS, *DIFFERENCES]


def updates_of(kind):
    if kind in ADAPTERS:
        make, options = ADAPTERS[kind]
        model = with_random_lora(in_float64(make()), **options)
        return model, adapter_updates(model)
    model = in_float64(DIFFERENCES[kind]())
    torch.manual_seed(4)
    weights = model.state_dict().items()
    tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in weights}
    return model, dense_updates(model, tuned)


WHOLE = [(kind, "module") for kind in KINDS]
SHARED = [(kind, shared) for kind in ("lora", *DIFFERENCES) for shared in ("block", "projection")]
PARTS = [(kind, "part") for kind in ADAPTERS]


@pytest.mark.parametrize(("kind", "granularity"), [*WHOLE, *SHARED, *PARTS])
def test_gate_gradients_agree_with_finite_differences(kind, granularity):
    model, updates = updates_of(kind)
    tokens = some_tokens()
    with gated(model, updates, initial_score=0.7, granularity=granularity) as gates:
        token_loss(model, tokens).backward()
        gradient = gates.gradient()
        with torch.no_grad():
            differences = slopes(gates, gates.scores(), lambda: token_loss(model, tokens), 1e-3)
    assert gradient.dtype == torch.float64
    scale = differences.abs().max()
    assert scale > 1e-4
    assert float((gradient - differences).abs().max() / scale) < 1e-6


@pytest.mark.parametrize("granularity", ["module", "part"])
@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "adalora"])
def test_a_second_adapter_is_not_gated_and_switching_thaws_nothing(kind, granularity):
    """As trainers with a reference do it."""
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
    own = {"link": "identity", "granularity": granularity}
    with gated(model, updates, initial_score=0.3, **own) as gates:
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
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize(("kind", "granularity"), [*WHOLE, *PARTS])
def test_open_gates_are_the_tuned_model_and_closed_gates_the_base(kind, granularity):
    model, updates = updates_of(kind)
    losses = []  # with all gates closed, and open
    with torch.no_grad():
        for value in (0.0, 1.0):
            own = {"link": "identity", "granularity": granularity}
            with gated(model, updates, initial_score=value, **own):
                losses.append(float(token_loss(model, some_tokens())))
        expected = [token_loss(model, some_tokens())]
        if kind in ADAPTERS:
            with model.disable_adapter():
                expected.insert(0, token_loss(model, some_tokens()))
        else:
            names = tuple(f"{update.module.name}." for update in updates)
            for name, parameter in model.named_parameters():
                if f"{name}.".startswith(names):
                    parameter.copy_(updates[0].tuned[name])
            expected.append(token_loss(model, some_tokens()))
    assert losses == pytest.approx([float(loss) for loss in expected], rel=1e-12)
    assert abs(losses[1] - losses[0]) > 1e-3


@pytest.mark.parametrize(("kind", "granularity"), [*WHOLE, *PARTS])
def test_gates_leave_no_trace(kind, granularity):
    model, updates = updates_of(kind)
    model.train()
    next(model.children()).eval()
    token_loss(model, some_tokens()).backward()  # gradients that must come back
    own = {"initial_score": 2.0, "granularity": granularity}
    with unchanged(model), gated(model, updates, **own) as gates:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert {id(p) for p in trainable} == {id(p) for p in gates.parameters()}
        model.eval()
        token_loss(model, some_tokens(seed=2)).backward()
        torch.rand(3)
        np.random.rand(3)
    with unchanged(model), pytest.raises(KeyError), gated(model, updates, **own):
        raise KeyError


def test_pythons_random_state_is_restored_too():
    # on its own, because the shape checks of the other functions draw from it while tests run
    model = tiny_llama()
    before = random.getstate()
    with preserved(model):
        random.random()
    assert random.getstate() == before


def test_a_weight_that_changes_and_a_gate_that_takes_no_part_are_reported():
    model, updates = updates_of("lora")
    silent = pytest.raises(GuardError, match=r"must take part in the loss, but 14 of 14 did not")
    with gated(model, updates, initial_score=2.0) as gates, silent:
        gates.gradient()
    changed = pytest.raises(GuardError, match=r"weights .* must not change .* first .*embed_tokens")
    with changed, gated(model, updates, initial_score=2.0), torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1


def test_merged_adapters_and_checkpoints_of_other_shapes_are_refused():
    model = with_random_lora(tiny_llama(), bias="all")  # which does not matter without biases
    assert len(adapter_updates(model)) == 14
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged into the base weights"):
        adapter_updates(model)
    model = tiny_llama()
    tuned = dict(model.state_dict())
    with pytest.raises(ModelError, match="must differ from the base"):
        dense_updates(model, tuned)
    tuned["model.layers.1.mlp.up_proj.weight"] = torch.zeros(5, 16)
    with pytest.raises(ModelError, match=r"weight is \(24, 16\) in the model and \(5, 16\)"):
        dense_updates(model, tuned)
    del tuned["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"must hold model.layers.1.mlp.up_proj.weight"):
        dense_updates(model, tuned)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_whole_update_is_what_merging_adds_to_the_weight(kind):
    model, updates = updates_of(kind)
    before = [weight_of(update).clone() for update in updates]
    deltas = [update.delta() for update in updates]
    assert [delta.shape for delta in deltas] == [update.module.shape for update in updates]
    model.merge_adapter()
    for update, weight, delta in zip(updates, before, deltas, strict=True):
        merged = (weight_of(update) - weight).float()
        torch.testing.assert_close(delta, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "adalora"])
def test_a_part_is_a_singular_direction_of_the_weight_change(kind):
    """The loss with some parts closed is that of weights truncated by torch's own SVD."""
    model, updates = updates_of(kind)
    losses, tokens = [], some_tokens()
    with torch.no_grad():
        with gated(model, updates, initial_score=1.0, link="identity", granularity="part") as gates:
            is_open = torch.rand(len(gates), generator=torch.Generator().manual_seed(6)) > 0.5
            kept = is_open.split([len(parameter) for parameter in gates.parameters()])
            gates.set_scores(is_open.double())
            losses.append(float(token_loss(model, tokens)))
        bases = [weight_of(update).clone() for update in updates]
        model.merge_adapter()
        merged = [weight_of(update).clone() for update in updates]
        model.unmerge_adapter()
        with model.disable_adapter():
            for update, base, after, keep in zip(updates, bases, merged, kept, strict=True):
                change, added = after - base, torch.zeros_like(base)
                if "dora" in kind:
                    layer = update.layer
                    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    product = layer.scaling["default"] * b @ a
                    scale = after.norm(dim=1, keepdim=True) / (base + product).norm(
                        dim=1, keepdim=True
                    )
                    change, added = scale * product, keep[-1] * (scale - 1) * base
                    keep = keep[:-1]
                left, values, right = torch.linalg.svd(change, full_matrices=False)
                left, values, right = (
                    left[..., : len(keep)],
                    values[..., : len(keep)],
                    right[..., : len(keep), :],
                )
                added += (left * (values * keep)[..., None, :]) @ right
                set_weight(update, base + added)
            losses.append(float(token_loss(model, tokens)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def set_weight(update, value):
    """Give the base model a weight of its own, with rows for outputs, even where it was tied."""
    layer = update.layer.get_base_layer()
    name = update.module.last_name if update.module.is_stacked else "weight"
    setattr(layer, name, torch.nn.Parameter(value.T if isinstance(layer, Conv1D) else value))


# Those whose gates stand on something of each example.
OF_EXAMPLES = [kind for kind in ADAPTERS if "expert" not in kind and "weight" not in kind]
BY_EXAMPLE = [(kind, wide) for kind in OF_EXAMPLES for wide in ("module", "block", "part")]


@pytest.mark.parametrize(("kind", "granularity"), BY_EXAMPLE)
def test_squared_gradients_are_those_of_examples_on_their_own(kind, granularity):
    model, updates = updates_of(kind)
    tokens, own = some_tokens(), []
    if (kind, granularity) == ("adalora", "part"):
        assert "part" in updates[0].without_examples
        return
    with gated(model, updates, initial_score=0.7, granularity=granularity) as gates:
        with gates.by_example():
            token_loss(model, tokens).backward()
            if "GPT-2" in kind:
                with pytest.raises(ModelError, match=r"same examples, .*wte and .*wpe do not"):
                    gates.squared_gradients()
                return
            squares, gradient = gates.squared_gradients(), gates.gradient()
        for row in tokens:
            for parameter in gates.parameters():
                parameter.grad = None
            token_loss(model, row[None]).backward()
            own.append(gates.gradient() / len(tokens))  # all rows have as many tokens
    torch.testing.assert_close(gradient, sum(own))
    slope = torch.sigmoid(torch.tensor(0.7)) * torch.sigmoid(torch.tensor(-0.7))  # of the link
    torch.testing.assert_close(slope**2 * squares, torch.stack(own).square().sum(0))


def weight_of(update):
    """The weight in the base model, with rows for outputs."""
    layer = update.layer.get_base_layer()
    name = update.module.last_name if update.module.is_stacked else "weight"
    weight = layer.get_parameter(name).detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def test_lora_dropout_is_off_while_gates_are_in():
    model, tokens = with_random_lora(tiny_llama(), lora_dropout=0.5).train(), some_tokens()
    with gated(model, adapter_updates(model), initial_score=1.0), torch.no_grad():
        assert torch.equal(token_loss(model, tokens), token_loss(model, tokens))
    with torch.no_grad():
        assert not torch.equal(token_loss(model, tokens), token_loss(model, tokens))
