# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from architectures import ARCHITECTURES, table_row, whole_way
from keylayers.model.modules import map_modules
from keylayers.updates import adapter_updates

DOCS = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"


BUILD = {architecture.title: architecture.build for architecture in ARCHITECTURES}
# One of each kind of block in the short tier: fused and stacked weights, encoders, towers, a head.
SHORT = ("Llama", "GPT-2", "Mixtral", "Mamba", "T5", "LLaVA, all towers", "BERT, classification")


def case(architecture):
    marks = [] if architecture.title in SHORT else [pytest.mark.long]
    return pytest.param(architecture, id=architecture.title, marks=marks)


@pytest.mark.filterwarnings("ignore")  # every architecture has deprecations of its own
@pytest.mark.parametrize("architecture", [case(a) for a in ARCHITECTURES])
def test_lora_rank_select_train_save_and_reload(architecture):
    outcome = whole_way(architecture)
    assert outcome.open_error < 1e-6
    assert outcome.closed_error < 1e-6
    assert outcome.changed == outcome.selected
    assert outcome.reload_error < 1e-6
    assert table_row(architecture, outcome) in DOCS.read_text().splitlines()


def test_the_table_has_no_row_without_a_test():
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    titles = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert titles == ["architecture", *BUILD]


def test_layers_that_a_state_space_mixer_only_reads_are_no_modules():
    assert {info.projection for info in map_modules(BUILD["Mamba"]())} == {"in_proj", "x_proj"}


def test_experts_of_a_kind_are_one_module_a_block():
    experts = [info for info in map_modules(BUILD["Mixtral"]()) if info.is_stacked]
    assert [info.name for info in experts] == [
        f"model.layers.{block}.mlp.experts.{kind}_proj"
        for block in (0, 1)
        for kind in ("gate_up", "down")
    ]
    assert experts[0].shape == (4, 48, 16)
    assert experts[0].num_parameters == 4 * 48 * 16


def test_the_decoders_blocks_are_numbered_on_from_the_encoders():
    infos = map_modules(BUILD["T5"]())
    blocks = {info.name.split(".layer.")[0]: info.block_index for info in infos}
    assert blocks == {
        "encoder.block.0": 0,
        "encoder.block.1": 1,
        "decoder.block.0": 2,
        "decoder.block.1": 3,
    }


def test_a_tower_for_images_counts_only_where_asked_for_or_adapted():
    llava = BUILD["LLaVA"]()
    assert not any("vision" in info.name for info in map_modules(llava))
    assert any("vision" in info.name for info in map_modules(llava, "all"))
    adapted = get_peft_model(llava, LoraConfig(r=2, target_modules=["fc1", "q_proj"]))
    assert any("vision" in update.module.name for update in adapter_updates(adapted))
