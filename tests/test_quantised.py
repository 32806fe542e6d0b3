# SPDX-License-Identifier: Apache-2.0
"""A base in 4 bits (QLoRA): the whole way on the command line, exact gates, weights left alone."""

import json
import warnings

import pytest
import torch

from commands import keylayers, rank, read, record_of
from differences import noise_of, slopes_of
from tiny_files import NUM_MODULES

pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes (keylayers[qlora])")


@pytest.fixture(scope="module")
def ranked(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("ranked")
    assert rank(tiny, output, "--load-in-4bit") == 0
    return output


def test_a_ranking_is_verified_and_its_selection_trained_in_4_bits_too(ranked, tiny, tmp_path):
    ranking = read(ranked)
    assert len({one["score"] for one in ranking["modules"]}) == NUM_MODULES
    losses = ranking["provenance"]["held_out_loss_nats"]
    assert losses["tuned"] < losses["base"]
    assert keylayers("verify", "--ranking", ranked, "--points", 3, "--random-orders", 1) == 0
    verified = json.loads((ranked / "verification.json").read_text())
    assert verified["provenance"]["options"]["load_in_4bit"] is True
    curve = verified["best_first"]["losses"]
    assert curve[0] == pytest.approx(losses["base"], rel=1e-5)
    assert curve[-1] == pytest.approx(losses["tuned"], rel=1e-5)
    output = tmp_path / "trained"
    more = ("--budget", 5, "--steps", 4, "--output", output)
    assert keylayers("train", "--ranking", ranked, *more) == 0
    record = record_of(output)
    assert record["options"]["load_in_4bit"] is True
    assert record["results"][0]["held_out_loss_nats"] == pytest.approx(losses["base"], rel=1e-5)
    assert plain_peft_modules(tiny / "model", output) == set(record["selection"]["modules"])


def plain_peft_modules(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries are the user's
        packed = BitsAndBytesConfig(load_in_4bit=True)
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=packed)
        return set(PeftModel.from_pretrained(model, adapter).targeted_module_names)


@pytest.fixture
def trainer(tiny):
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare
    from keylayers.model.loading import load_model, load_tokenizer
    from keylayers.model.options import ModelOptions
    from keylayers.training.options import TrainingOptions
    from keylayers.training.run import fine_tune, make_trainer, new_adapter

    source = ModelOptions(model=str(tiny / "model"), load_in_4bit=True, dtype="float32")
    base, tokenizer = load_model(source), load_tokenizer(source)
    assert any(type(one).__name__ == "Linear4bit" for one in base.modules())
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    options = TrainingOptions(learning_rate=0.02, warmup_steps=0, lora_rank=4, batch_size=4)
    names = [name for name, one in base.named_modules() if type(one).__name__ == "Linear4bit"]
    model = new_adapter(base, names, options, num_steps=10)
    trainer = make_trainer(model, tokenizer, data.train, options, num_steps=10)
    fine_tune(trainer)
    return trainer


def test_the_gradient_of_the_gates_is_the_slope_of_the_loss(trainer):
    """In float32, in which bitsandbytes computes: within some roundings of the losses."""
    from keylayers.gates import gated
    from keylayers.trainers.loss import TrainerLoss
    from keylayers.updates import adapter_updates

    source = TrainerLoss(trainer)
    updates = adapter_updates(trainer.model)
    with gated(trainer.model, updates, initial_score=0.0, link="identity") as gates, source.quiet():
        batch = next(source.batches(0))
        at = 0.3 + 0.6 * torch.rand(len(gates), generator=torch.Generator().manual_seed(1))
        gates.set_scores(at)
        loss = source.backward(batch, step=1)
        gradient = gates.gradient()
        slopes = slopes_of(gates, at, lambda: source.value(batch, step=1))
    noise = noise_of(loss)
    assert (slopes - gradient).abs().max() < noise
    assert gradient.abs().max() > 100 * noise  # the noise could not hide a wrong gradient


def test_evaluation_leaves_the_packed_weights_alone(trainer):
    """On some processors bitsandbytes packs them anew in evaluation, with rounded scales."""
    import keylayers
    from keylayers.evaluation.loss import held_out_loss

    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # as on such a processor
    before = {name: one.clone() for name, one in trainer.model.state_dict().items()}
    held_out_loss(trainer, trainer.train_dataset)
    keylayers.rank_modules(trainer, mask_batches=1)
    after = trainer.model.state_dict()
    assert all(torch.equal(one, after[name]) for name, one in before.items())
