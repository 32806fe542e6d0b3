# SPDX-License-Identifier: Apache-2.0
"""Every option of PEFT's LoRA: gates open are plain PEFT, gates closed the base, or a refusal.

The table must have a row for each field of `LoraConfig` and for each of its starts, so an option
that a new PEFT brings is a failing row.
"""

from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as own_configs

from keylayers.errors import ModelError
from keylayers.gates import gated
from keylayers.model.loading import load_adapter
from keylayers.updates import adapter_updates

from tiny_models import tiny_llama

TARGETS = {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]}
IDS = torch.arange(3, 35).reshape(2, 16)
CHANGES_BASE = r"gates must start from the base model, but .*`init_lora_weights`"
VARIANT = r"the variant \w+ of LoRA is not known to be linear"

EMBEDDINGS = ["embed_tokens", "q_proj"]
# Option -> values with which gates are exact.
EXACT = {
    "r": [3],
    "target_modules": ["all-linear", r".*\.1\.mlp\.\w+_proj", EMBEDDINGS, ["lm_head", "q_proj"]],
    "exclude_modules": [["model.layers.0.self_attn.q_proj"]],
    "lora_alpha": [7],
    "lora_dropout": [0.5],
    "use_rslora": [True],
    "modules_to_save": [["lm_head"], ["k_proj"], ["embed_tokens"]],
    "layers_to_transform": [[1]],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "rank_pattern": [{"q_proj": 3}],
    "alpha_pattern": [{"q_proj": 9}],
    "trainable_token_indices": [[3, 4]],
    "use_dora": [True],
    "ensure_weight_tying": [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"],
}
BDLORA = own_configs.BdLoraConfig(target_modules_bd_a=TARGETS["target_modules"])
# Option, the refusal's text -> values that are refused.
REFUSED = {
    ("bias", "biases of the base that are trained"): ["lora_only", "all"],
    ("use_dora", "DoRA on embeddings"): [{"use_dora": True, "target_modules": EMBEDDINGS}],
    ("lora_bias", "`lora_bias=True` adds a bias"): [True],
    ("layer_replication", "`layer_replication`"): [[(0, 2), (1, 2)]],
    ("init_lora_weights", VARIANT): ["mica"],
    ("init_lora_weights", CHANGES_BASE): [
        "pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga",
    ],
    ("use_bdlora", VARIANT): [BDLORA],
    ("monteclora_config", VARIANT): [own_configs.MontecloraConfig()],
    ("velora_config", VARIANT): [own_configs.VeloraConfig()],
    ("kasa_config", VARIANT): [own_configs.KasaConfig()],
    ("alora_invocation_tokens", VARIANT): [[3, 4]],
}  # fmt: skip
# Why there is nothing to try -> options.
UNTRIED = {
    "for Conv1D and stacked experts, see test_gates.py": ["fan_in_fan_out", "target_parameters"],
    "routes between several adapters, and one must be active": ["arrow_config"],
    "only for GPTQ models": ["use_qalora", "qalora_group_size"],
    "of a start": ["eva_config", "corda_config", "loftq_config", "lora_ga_config"],
    "needs Megatron": ["megatron_config", "megatron_core"],
    "names the model's class": ["task_type", "auto_mapping"],
    "other tuners have configs of their own": ["peft_type"],
    "a record": ["peft_version", "base_model_name_or_path", "revision"],
    "does not change the update": ["runtime_config", "inference_mode"],
}
CASES = [
    *((option, value, None) for option, values in EXACT.items() for value in values),
    *((option, value, text) for (option, text), values in REFUSED.items() for value in values),
]


def test_every_option_and_every_start_of_peft_has_a_row():
    tried = {option for option, *_ in CASES}
    assert {one.name for one in fields(LoraConfig)} == tried.union(*UNTRIED.values())
    kind = get_type_hints(LoraConfig)["init_lora_weights"]
    (starts,) = (part for part in get_args(kind) if get_origin(part) is Literal)
    tried = {value for option, value, _ in CASES if option == "init_lora_weights"}
    assert {start.partition("_[")[0] for start in get_args(starts)} - {"pissa_niter"} <= tried


def base(is_tied=False):
    """A tiny model with biases in its attention, always the same."""
    more = {"attention_bias": True, "tie_word_embeddings": is_tied}
    return tiny_llama(initializer_range=0.2, **more)


def loss_of(model):
    with torch.no_grad():
        return float(model.eval()(input_ids=IDS, labels=IDS).loss)


def write_adapter(folder, options, is_tied=False):
    """An adapter with noise in all that it trains, as PEFT saves it."""
    start = options.get("init_lora_weights")
    needs_data = start in ("corda", "loftq", "lora_ga")  # made elsewhere: only the config matters
    given = options | ({"init_lora_weights": True} if needs_data else {})
    tuned = get_peft_model(base(is_tied), LoraConfig(task_type="CAUSAL_LM", **given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if needs_data:
        config = tuned.peft_config["default"]
        config.init_lora_weights, config.loftq_config = start, {"loftq_bits": 4}
    tuned.save_pretrained(folder)
    return tuned


def without_lora(folder, is_tied):
    """The loss with everything but LoRA on: modules and tokens that are trained as they are."""
    model = PeftModel.from_pretrained(base(is_tied), folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.zero_()
    return loss_of(model)


@pytest.mark.filterwarnings("ignore")  # PEFT's, about options that the test gives on purpose
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("option", "value", "text"), CASES)
def test_gates_are_exact_or_refused(option, value, text, is_tied, tmp_path):
    is_whole = isinstance(value, dict) and option in value
    options = TARGETS | (value if is_whole else {option: value})
    live = write_adapter(tmp_path, options, is_tied)
    if text is not None:
        with pytest.raises(ModelError, match=text):
            adapter_updates(load_adapter(base(is_tied), str(tmp_path)))
        with pytest.raises(ModelError, match=text):
            adapter_updates(live)  # as inside a run
        return
    tuned = loss_of(PeftModel.from_pretrained(base(is_tied), tmp_path))
    is_alone = {"modules_to_save", "trainable_token_indices"}.isdisjoint(options)
    untuned = loss_of(base(is_tied)) if is_alone else without_lora(tmp_path, is_tied)
    assert abs(tuned - untuned) > 1e-3
    model = load_adapter(base(is_tied), str(tmp_path))
    updates = adapter_updates(model)
    for value, expected in ((1.0, tuned), (0.0, untuned)):
        with gated(model, updates, initial_score=value, link="identity"):
            assert loss_of(model) == pytest.approx(expected, abs=1e-5)
