# SPDX-License-Identifier: Apache-2.0
"""The backward pass stops at the lowest trained module, under gradient checkpointing too."""

import pytest
import torch
from transformers import TrainerCallback

from tiny_files import NUM_BLOCKS, tiny_model
from trainers import TOKENIZER, build

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
UPPER = r"model\.layers\.(1|2)\..*proj"
STEPS = 3


class Calls(TrainerCallback):
    """How often each block is run, recomputations too."""

    def __init__(self):
        self.counts = [0] * NUM_BLOCKS
        self.handles = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def count(index):
            def hook(*_):
                self.counts[index] += 1

            return hook

        blocks = model.get_base_model().model.layers
        for index, block in enumerate(blocks):
            inner = block.self_attn.q_proj  # run again with its block
            self.handles.append(inner.register_forward_hook(count(index)))

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()


def trained(kind="SFT", targets=UPPER, shallow=True, **options):
    from peft import LoraConfig

    import keylayers

    peft = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    trainer = build(
        kind, "config", is_trained=False, is_moved=False, peft=peft, max_steps=STEPS, **options
    )
    calls = Calls()
    trainer.add_callback(calls)
    if shallow:
        trainer.add_callback(keylayers.ShallowBackward())
    trainer.train()
    weights = {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if "lora_" in name
    }
    return trainer, weights, calls.counts


@pytest.mark.parametrize("kind", ["SFT", "DPO", "ORPO"])
def test_frozen_blocks_are_not_recomputed_and_the_training_is_the_same(kind):
    _, plain, full = trained(kind, shallow=False, activation_checkpointing=True)
    trainer, weights, counts = trained(kind, activation_checkpointing=True)
    assert weights.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    assert full[0] == full[1] == full[2]
    assert counts[0] < counts[1] == full[1]
    own = [
        hook
        for hook in trainer.model.get_input_embeddings()._forward_hooks.values()
        if hook.__module__.startswith("keylayers")
    ]
    assert own == []


def test_trained_embeddings_keep_their_gradient():
    targets = r"model\.(embed_tokens|layers\.2\..*proj)"
    _, plain, _ = trained(targets=targets, shallow=False, activation_checkpointing=True)
    _, weights, _ = trained(targets=targets, activation_checkpointing=True)
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())
    assert any("embed_tokens" in name and bool(value.any()) for name, value in weights.items())


def test_checkpointing_that_needs_gradients_of_inputs_keeps_them():
    options = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    }
    _, plain, full = trained(shallow=False, **options)
    _, weights, counts = trained(**options)
    assert counts == full
    assert all(torch.equal(value, plain[name]) for name, value in weights.items())


def test_the_one_training_path_does_it_by_itself():
    from datasets import Dataset

    from keylayers.training.options import TrainingOptions
    from keylayers.training.run import fine_tune, make_trainer, new_adapter

    options = TrainingOptions(batch_size=2, gradient_checkpointing=True, warmup_steps=0)
    base = tiny_model(len(TOKENIZER))
    names = [f"model.layers.2.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    model = new_adapter(base, names, options, num_steps=2)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    trainer = make_trainer(model, TOKENIZER, Dataset.from_list(rows), options, num_steps=2)
    calls = Calls()
    trainer.add_callback(calls)
    fine_tune(trainer)
    assert calls.counts == [2, 2, 4]
