# SPDX-License-Identifier: Apache-2.0
"""Scores for trainers that users build: each objective, each way of giving it an adapter."""

import itertools
import math
from functools import cache

import pytest
import torch
from transformers import set_seed

from keylayers import rank_modules
from keylayers.errors import ConfigError, GuardError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.model.preserve import preserved
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates
from scored import check_gradient, everything, masked
from tiny_files import NUM_MODULES
from trainers import CASES, DATA, TOKENIZER, WithOwnLoss, build, lora

from tiny_models import unchanged

# trl 1.16 asks transformers 5.23 for names that transformers renamed; gone when trl follows
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")


trainer_of = cache(build)  # every test must leave it as it was


def rank(trainer, method="elimination", mask_dataset=None, **values):
    few = {"elimination": {"mask_batches": 2}, "path": {"mask_batches": 2, "path_points": 2}}
    few |= {"ila": {"mask_steps": 3}, "price": {"mask_steps": 3}}
    return rank_modules(trainer, method, mask_dataset=mask_dataset, **few.get(method, {}) | values)


def scores_of(trainer, method="elimination", **values):
    return [module.score for module in rank(trainer, method, **values).modules]


LEARNED = [("SFT", "config"), ("DPO", "model"), ("KTO", "config"), ("GRPO", "model")]
SCORED = [(*case, "path") for case in CASES] + [(*case, "ila") for case in LEARNED]
SCORED += [("SFT", "model", "elimination"), ("GRPO", "config", "elimination")]
SCORED += [("GRPO", "model", method) for method in ("price", "fisher", "update-norm")]


@pytest.mark.parametrize(("kind", "way", "method"), SCORED)
def test_every_module_gets_a_score_and_all_is_as_before(kind, way, method):
    trainer = trainer_of(kind, way)
    if kind == "SFT":
        trainer._metrics["train"]["entropy"].append(1.0)  # of steps that are not logged yet
    with unchanged(trainer, everything):
        ranking = rank(trainer, method)
    scores = [module.score for module in ranking.modules]
    assert all(math.isfinite(score) for score in scores)
    assert len(scores) == len(set(scores)) == NUM_MODULES  # each gate has its own gradient
    assert scores_of(trainer, method) == scores
    made_by = ranking.provenance
    assert made_by["trainer"] == type(trainer).__name__
    assert ("loss_reduction_nats" in made_by["mask"]) == (method == "path" and kind != "GRPO")


def hold_what_has_no_gradient(trainer, source, batch):
    """KTO's estimate of the divergence is a number to its loss: the same at every gate here."""
    if not hasattr(trainer, "_compute_kl_logps"):
        return
    estimate, found = trainer._compute_kl_logps, []
    trainer._compute_kl_logps = lambda *given: found.append(estimate(*given)) or found[-1]
    source.value(batch, step=1)
    held = itertools.cycle(found)
    trainer._compute_kl_logps = lambda *_: next(held)


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_the_gradient_of_the_gates_is_the_slope_of_the_trainers_own_loss(kind, way):
    trainer = trainer_of(kind, way)
    with masked(trainer, 0.0) as (gates, source):
        batch = next(source.batches(0))
        hold_what_has_no_gradient(trainer, source, batch)
        torch.manual_seed(0)
        check_gradient(gates, source, batch)


def thaw(name, parameter):
    if "layers.1.mlp.up_proj.lora_A" in name:
        parameter.requires_grad_(True)


def cast(name, parameter):
    """As TRL does with trained weights on a 4-bit base: small steps would be rounded away."""
    if name.endswith("score"):
        parameter.data = parameter.data.to(torch.bfloat16)


THAWED = r"1 other parameters, first base_model\S+layers\.1\.mlp\.up_proj\.lora_A\S+, which"
MEDDLING = [
    (thaw, "elimination", f"only gates may be trained.+{THAWED} got a grad"),
    (thaw, "leave-one-out", f"{THAWED} was unfrozen"),  # never goes backward
    (cast, "elimination", r"gates must be float32, but that of \S+ became torch.bfl"),
]


@pytest.mark.parametrize(("meddle", "method", "message"), MEDDLING)
def test_a_trainer_whose_loss_thaws_weights_or_casts_gates_is_stopped(meddle, method, message):
    class Meddling(WithOwnLoss):
        def compute_loss(self, model, inputs, **named):
            for name, parameter in model.named_parameters():
                meddle(name, parameter)
            return super().compute_loss(model, inputs, **named)

    trainer = build("own loss", "model", own=Meddling)
    with unchanged(trainer, everything), pytest.raises(GuardError, match=message):
        rank(trainer, method)


def reference(trainer, mask):
    """What DPO compares with, on the first batch."""
    torch.manual_seed(0)
    batch = next(iter(trainer.get_train_dataloader()))
    with mask, torch.no_grad():
        return torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))


@pytest.mark.parametrize("way", ["config", "model", "dora"])
def test_the_reference_is_that_of_the_trainer_alone_at_every_gate(way):
    dora = {"peft": lora("DPO", use_dora=True)} if way == "dora" else {}
    trainer = build("DPO", "model", **dora) if dora else trainer_of("DPO", way)
    own = reference(trainer, preserved(trainer.model))
    with trainer.model.disable_adapter():
        base = reference(trainer, preserved(trainer.model))
    assert torch.equal(own, base) == (way == "config")  # or where the user's adapter began
    assert all(torch.equal(reference(trainer, masked(trainer, at)), own) for at in (0.0, 0.5, 1.0))


def test_grpo_generates_with_the_masked_model_and_again_for_each_mask(monkeypatch):
    trainer = trainer_of("GRPO", "config")
    old = trainer._buffered_inputs
    assert old is not None
    monkeypatch.setattr(trainer.generation_config, "do_sample", False)

    def completions(gates, value):
        gates.set_scores(torch.full((len(gates),), value))
        parts = source.parts(batch)
        assert len(parts) == trainer.args.steps_per_generation
        columns = ("prompt_ids", "completion_ids")
        found = (torch.cat([part[name] for part in parts]).tolist() for name in columns)
        return sorted(zip(*found, strict=True))  # the parts are shuffled

    def greedy(model):
        prompts = TOKENIZER(
            [row["prompt"] for row in batch], return_tensors="pt", padding=True, padding_side="left"
        )
        made = model.generate(**prompts, do_sample=False, max_new_tokens=6, temperature=None)
        length = prompts["input_ids"].shape[1]
        return sorted((row[:length].tolist(), row[length:].tolist()) for row in made)

    with masked(trainer, 1.0) as (gates, source):
        batch = next(source.batches(0))
        closed, opened = completions(gates, 0.0), completions(gates, 1.0)
    with preserved(trainer.model):
        trainer.model.eval()
        assert opened == greedy(trainer.model)
        with trainer.model.disable_adapter():
            assert closed == greedy(trainer.model)
    assert closed != opened
    assert trainer._buffered_inputs is old


def test_grpo_sees_each_prompt_once_an_epoch():
    trainer = trainer_of("GRPO", "config")
    source = TrainerLoss(trainer)
    per_batch = 2 * trainer.args.steps_per_generation // trainer.num_generations
    with source.quiet():
        drawn = list(itertools.islice(source.batches(0), 8 // per_batch))
    prompts = [row["prompt"] for batch in drawn for row in batch]
    assert sorted(set(prompts)) == sorted(DATA["GRPO"]()["prompt"])
    assert len(prompts) == 8 * trainer.num_generations


NEED_LOSSES = ("leave-one-out", "shapley", "lora-drop", "eva", "cka")
REFUSED = [
    *(("GRPO", name, f"{name} needs a loss.+GRPO.+elimination, path, pri") for name in NEED_LOSSES),
    ("GRPO", None, r"held-out loss must be a function of the data.+rewards"),
    ("ORPO", "eva", r"eva needs batches.+ORPO.+chosen_input"),
]


@pytest.mark.parametrize(("kind", "method", "message"), REFUSED)
def test_what_a_trainers_loss_or_batches_cannot_give_is_refused(kind, method, message):
    trainer = trainer_of(kind, "model")
    with pytest.raises(ConfigError, match=message):
        held_out_loss(trainer, DATA[kind]()) if method is None else rank(trainer, method)


def test_a_copy_of_the_model_that_gates_cannot_reach_is_refused(monkeypatch):
    trainer = trainer_of("GRPO", "model")
    monkeypatch.setattr(trainer, "use_vllm", True)
    with pytest.raises(ConfigError, match="use_vllm=False"):
        rank(trainer)


def test_adalora_is_trained_as_a_reward_model_too():
    assert len(scores_of(trainer_of("Reward", "model"), "adalora", mask_steps=10)) == NUM_MODULES


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_lora_drop_looks_at_the_model_and_not_at_its_reference(kind):
    """Independently: the inputs of the trained model's layers, without the trainer's loss."""
    trainer = trainer_of(kind, "config")
    scores = {m.name: m.score for m in rank(trainer, "lora-drop", mask_batches=1).modules}
    updates = adapter_updates(trainer.model)
    set_seed(trainer.args.seed)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {}
    with preserved(trainer.model), torch.no_grad():
        for update in updates:
            update.layer.register_forward_hook(
                lambda _, given, __, name=update.module.name: inputs.update({name: given[0]})
            )
        trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for update in updates:
        x = inputs[update.module.name][batch["attention_mask"].bool()]
        expected = (x @ update.delta().T).square().sum(dim=-1).mean()
        assert scores[update.module.name] == pytest.approx(float(expected), rel=1e-3)


def test_the_head_of_a_reward_model_stays_as_trained_at_every_gate():
    trainer = trainer_of("Reward", "config")
    head = trainer.model.get_base_model().score
    trained, original = head.modules_to_save["default"].weight, head.original_module.weight
    assert not torch.equal(trained, original)
    batch = next(iter(trainer.get_train_dataloader()))
    hidden = {}
    with masked(trainer, 0.0), torch.no_grad():
        head.register_forward_pre_hook(lambda _, given: hidden.update(last=given[0]))
        rewards = trainer.model(**batch).logits
    every = hidden["last"] @ trained.T
    last = batch["attention_mask"].sum(dim=1) - 1
    assert torch.allclose(rewards, every[torch.arange(len(last)), last], atol=1e-5)
