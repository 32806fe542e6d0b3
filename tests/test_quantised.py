# SPDX-License-Identifier: Apache-2.0
"""A base in 4 bits (QLoRA): exact gates, and packed weights left alone.

The whole way on the command line is in test_updates.py.
"""

import pytest
import torch

from differences import check_gradient, masked
from keylayers import rank_modules
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.evaluation.held_out import held_out_loss
from keylayers.model.loading import load_model, load_tokenizer
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter

pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes (keylayers[qlora])")


@pytest.fixture
def trainer(tiny):
    source = ModelOptions(model=str(tiny / "model"), load_in_4bit=True, dtype="float32")
    base, tokenizer = load_model(source), load_tokenizer(source)
    assert any(type(module).__name__ == "Linear4bit" for module in base.modules())
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    options = TrainingOptions(learning_rate=0.02, warmup_steps=0, lora_rank=4, batch_size=4)
    names = [info.name for info in map_modules(base)]
    model = new_adapter(base, names, options, num_steps=10)
    trainer = make_trainer(model, tokenizer, data.train, options, num_steps=10)
    fine_tune(trainer)
    return trainer


def test_the_gradient_of_the_gates_is_the_slope_of_the_loss(trainer):
    with masked(trainer, 0.0) as (gates, source):
        check_gradient(gates, source, next(source.batches(0)))


def test_evaluation_leaves_the_packed_weights_alone(trainer):
    """On some processors bitsandbytes packs them again in evaluation, with rounded scales."""
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # as on such a processor
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    held_out_loss(trainer, trainer.train_dataset)
    rank_modules(trainer, mask_batches=1)
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
