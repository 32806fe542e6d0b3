# SPDX-License-Identifier: Apache-2.0
"""The whole way on every architecture, from LoRA on all modules to a reloaded selection."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from architectures import NAMED, changed_modules, modules_of, table, trainer_of
from keylayers import rank_modules
from keylayers.apply.trainable import add_lora
from keylayers.gates import gated
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
    assert all(torch.equal(named[name], weight) for name, weight in model.named_parameters())
    assert {own for names in named.stored.values() for own in names} == set(stored)


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
