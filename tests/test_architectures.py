# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from architectures import ARCHITECTURES, table_row, whole_way

DOCS = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"


@pytest.mark.filterwarnings("ignore")  # every architecture has deprecations of its own
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda one: one.title)
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
    assert titles == ["architecture", *(one.title for one in ARCHITECTURES)]


def test_layers_that_a_state_space_mixer_only_reads_are_no_modules():
    from keylayers.model.modules import map_modules

    mamba = next(one for one in ARCHITECTURES if one.title == "Mamba")
    assert {info.projection for info in map_modules(mamba.build())} == {"in_proj", "x_proj"}


def test_experts_of_a_kind_are_one_module_a_block():
    from keylayers.model.modules import map_modules

    mixtral = next(one for one in ARCHITECTURES if one.title == "Mixtral").build()
    experts = [info for info in map_modules(mixtral) if info.is_stacked]
    assert [info.name for info in experts] == [
        f"model.layers.{block}.mlp.experts.{kind}_proj"
        for block in (0, 1)
        for kind in ("gate_up", "down")
    ]
    assert experts[0].shape == (4, 48, 16)
    assert experts[0].num_parameters == 4 * 48 * 16


def test_the_decoders_blocks_are_numbered_on_from_the_encoders():
    from keylayers.model.modules import map_modules

    t5 = next(one for one in ARCHITECTURES if one.title == "T5").build()
    blocks = {info.name.split(".layer.")[0]: info.block_index for info in map_modules(t5)}
    assert blocks == {
        "encoder.block.0": 0,
        "encoder.block.1": 1,
        "decoder.block.0": 2,
        "decoder.block.1": 3,
    }


def test_a_tower_for_images_counts_only_where_asked_for_or_adapted():
    from peft import LoraConfig, get_peft_model

    from keylayers.model.modules import map_modules
    from keylayers.updates import adapter_updates

    llava = next(one for one in ARCHITECTURES if one.title == "LLaVA")
    assert not any("vision" in info.name for info in map_modules(llava.build()))
    assert any("vision" in info.name for info in map_modules(llava.build(), "all"))
    adapted = get_peft_model(llava.build(), LoraConfig(r=2, target_modules=["fc1", "q_proj"]))
    assert any("vision" in one.module.name for one in adapter_updates(adapted))
