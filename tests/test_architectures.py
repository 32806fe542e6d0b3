# SPDX-License-Identifier: Apache-2.0
"""The whole way on every architecture, from LoRA on all modules to a reloaded selection."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from architectures import NAMED, changed_modules, modules_of, table, trainer_of
from keylayers import rank_modules
from keylayers.apply.prune import names_in_base
from keylayers.apply.trainable import add_lora
from keylayers.errors import ModelError
from keylayers.gates import gated
from keylayers.model import checkpoint
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.options import ModelOptions
from keylayers.updates import adapter_updates

DOCS = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
# One of each kind of block in the short tier: fused and stacked weights, encoders, towers, a head.
SHORT = ("Llama", "GPT-2", "Mixtral", "Mamba", "T5", "LLaVA, all towers", "BERT, classification")


CASES = [
    pytest.param(each, id=title, marks=[] if title in SHORT else [pytest.mark.long])
    for title, each in NAMED.items()
]


@pytest.mark.filterwarnings("ignore")  # every architecture has deprecations of its own
@pytest.mark.parametrize("architecture", CASES)
def test_lora_rank_select_train_save_and_reload(architecture, tmp_path):
    names = [module.name for module in modules_of(architecture)]
    options = {"r": 2, "lora_alpha": 8, "task_type": architecture.task}
    trainer = trainer_of(add_lora(architecture.build(), names, **options), architecture)
    trainer.train()
    ranking = rank_modules(trainer, method="path", mask_batches=1, path_points=2)
    assert {module.name for module in ranking.modules} == set(names)
    check_gates(trainer.model.eval(), architecture)

    selection = ranking.select(0.3)
    fresh = get_peft_model(architecture.build(), selection.lora_config(**options))
    assert changed_modules(trainer_of(fresh, architecture)) == set(selection.names)
    fresh.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path)
    batch = architecture.batch()
    with torch.no_grad():
        mine, other = fresh.eval()(**batch).logits, loaded.eval()(**batch).logits
    assert float((mine - other).abs().max()) < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", NAMED.values(), ids=NAMED)
def test_a_stored_checkpoint_is_read_by_the_names_of_the_models_parameters(architecture, tmp_path):
    """transformers stores some weights under other names, and experts one by one."""
    model = architecture.build()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    stored = Checkpoint.open(ModelOptions(model=str(tmp_path)))
    named = stored.named_as_in(model)
    assert [n for n, own in model.named_parameters() if not torch.equal(named[n], own)] == []
    assert {own for names in named.stored.values() for own in names} == set(stored)


def test_of_two_tensors_for_one_parameter_the_one_is_read_that_transformers_loads(tmp_path):
    NAMED["Llama"].build().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(file)
    weights[name.removeprefix("model.")] = weights[name] + 1
    save_file(weights, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    named = Checkpoint.open(ModelOptions(model=str(tmp_path))).named_as_in(loaded)
    assert torch.equal(named[name], loaded.get_parameter(name))


def test_one_tensor_that_is_stored_for_three_parameters(tmp_path, monkeypatch):
    model, block = NAMED["GPT-NeoX"].build(), "gpt_neox.layers.0"
    parts = [f"mlp.part_{letter}.weight" for letter in "abc"]
    file = tmp_path / "model.safetensors"
    whole = torch.arange(12.0).reshape(6, 2)
    save_file({f"{block}.mlp.whole.weight": whole}, file, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    for part in parts:
        name = part.split(".")[1]
        for layer in model.gpt_neox.layers:
            layer.mlp.add_module(name, torch.nn.Linear(2, 2, bias=False))
    converter = WeightConverter("mlp.whole.weight", parts, [Chunk(dim=0)])
    monkeypatch.setattr(checkpoint, "get_model_conversion_mapping", lambda _: [converter])
    stored = Checkpoint.open(ModelOptions(model=str(tmp_path)))
    named = stored.named_as_in(model)
    for index, part in enumerate(parts):
        assert torch.equal(named[f"{block}.{part}"], whole[2 * index :][:2])
    with pytest.raises(ModelError, match=r"be stored alone, .*mlp.whole.* also holds .*part_b"):
        names_in_base(stored, stored, model, [f"{block}.mlp.part_a"])


@torch.no_grad()
def check_gates(model, architecture):
    """All open, the loss is the tuned model's; all closed, it is the base model's."""
    batch = architecture.batch()
    tuned = float(model(**batch).loss)
    with model.disable_adapter():
        base = float(model(**batch).loss)
    updates = adapter_updates(model)
    with gated(model, updates, initial_score=1.0, link="identity") as gates:
        assert float(model(**batch).loss) == pytest.approx(tuned, abs=1e-6)
        gates.set_scores(torch.zeros(len(gates)))
        closed = float(model(**batch).loss)
    if architecture.task != "SEQ_CLS":  # closed gates leave the trained head on
        assert closed == pytest.approx(base, abs=1e-6)
        assert abs(tuned - base) > 1e-3


def test_the_table_of_the_docs_holds_every_architecture():
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == table()


def test_modules_of_mixers_experts_encoders_and_decoders():
    """Layers that a mixer only reads are none, experts of a kind are one per block."""
    assert {info.projection for info in modules_of(NAMED["Mamba"])} == {"in_proj", "x_proj"}
    experts = [info for info in modules_of(NAMED["Mixtral"]) if info.is_stacked]
    kinds = ("gate_up_proj", "down_proj")
    assert [info.name for info in experts] == [
        f"model.layers.{block}.mlp.experts.{kind}" for block in (0, 1) for kind in kinds
    ]
    assert (experts[0].shape, experts[0].num_parameters) == ((4, 48, 16), 4 * 48 * 16)
    stacks = {info.name.split(".layer.")[0]: info.block_index for info in modules_of(NAMED["T5"])}
    names = ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")
    assert stacks == {name: index for index, name in enumerate(names)}


def test_a_tower_for_images_counts_only_where_asked_for_or_adapted():
    for title, is_mapped in (("LLaVA", False), ("LLaVA, all towers", True)):
        assert any("vision" in info.name for info in modules_of(NAMED[title])) == is_mapped
    config = LoraConfig(r=2, target_modules=["fc1", "q_proj"])
    adapted = get_peft_model(NAMED["LLaVA"].build(), config)
    assert any("vision" in update.module.name for update in adapter_updates(adapted))
