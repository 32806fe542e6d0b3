# SPDX-License-Identifier: Apache-2.0
"""`FreezeUnimportant`: one run that ranks, freezes and continues, whole or resumed, bit for bit."""

from pathlib import Path

import pytest
import torch
from accelerate.state import GradientState
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from commands import updated_modules
from keylayers import FreezeUnimportant, Ranking
from keylayers.errors import ConfigError, GuardError, ModelError
from keylayers.training.freeze import trainer_of
from keylayers.training.options import StabilityOptions
from scored import arguments, data
from tiny_files import tiny_tokenizer
from trainers import WithOwnLoss, build

from tiny_models import tiny_llama

NUM_STEPS = 14
NUM_MODULES = 14  # two blocks of seven
FREEZE_STEP = 8


class Snapshots(TrainerCallback):
    """LoRA matrices after each step, and whether accelerate reads the run's own data loader."""

    def __init__(self):
        self.after = {}
        self.has_own_loader = []

    def on_step_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self.after[state.global_step] = lora(model)
        active = GradientState().active_dataloader
        self.has_own_loader.append(active is train_dataloader)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = lora(model)


def lora(model):
    return {
        name.removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def changed_modules(before, after):
    """Modules of which a LoRA matrix differs."""
    return {
        name.partition(".lora_")[0]
        for name, value in after.items()
        if not torch.equal(value, before[name])
    }


def make(kind, folder, **options):
    """A trainer of LoRA with dropout, weight decay, momentum, and two batches a step."""
    torch.manual_seed(3)
    lora_config = LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(tiny_llama(), lora_config)
    settings = {
        **{"max_steps": NUM_STEPS, "learning_rate": 0.02, "weight_decay": 0.1},
        **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        **{"logging_steps": 3, "save_steps": 2, "save_strategy": "steps"},
        **{"output_dir": str(folder)} | options,
    }
    named = {"train_dataset": data(40), "eval_dataset": data(8)}
    if kind is SFTTrainer:
        settings["dataset_kwargs"] = {"skip_prepare_dataset": True}
        args, named["processing_class"] = arguments(SFTConfig, **settings), tiny_tokenizer()
    else:
        args = arguments(**settings)
    return kind(model=model, args=args, **named)


def freezing(**options):
    """Stable at exactly step 8, when the loss was measured twice."""
    own = {"window": FREEZE_STEP // 2, "epsilon": 1e9, "max_steps": 13, "mask_dataset": data(12)}
    if "mask_steps" not in options:
        own["mask_batches"] = 2
    return FreezeUnimportant(**(own | options))


def killed(folder, *callbacks, after, kind=Trainer, **options):
    """A run that is killed after a step; its last checkpoint."""

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == after:
                raise RuntimeError("the machine goes down")

    with pytest.raises(RuntimeError, match="goes down"):
        run(kind, folder, *callbacks, Kill(), **options)
    return str(folder / f"checkpoint-{after}")


def run(kind, folder, *callbacks, resume=None, **options):
    trainer = make(kind, folder, **options)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("kind", "action"), [(SFTTrainer, "freeze"), (WithOwnLoss, "remove")])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(kind, action, tmp_path):
    whole = freezing(action=action)
    weights = lora(run(kind, tmp_path / "whole", whole).model)
    assert whole.frozen_at_step == FREEZE_STEP
    assert len(whole.frozen) == 4  # a quarter of 14 is 3.5
    for stop in (6, FREEZE_STEP, 10):
        stopped, again = freezing(action=action), freezing(action=action)
        checkpoint = killed(tmp_path / f"{stop}", stopped, after=stop, kind=kind)
        resumed = run(kind, tmp_path / f"{stop}", again, resume=checkpoint)
        if stop >= FREEZE_STEP:  # with its seconds: there was no second ranking
            assert again.ranking == stopped.ranking
        assert again.ranking.modules == whole.ranking.modules
        assert (again.frozen_at_step, again.reason) == (FREEZE_STEP, "stable")
        assert again.stability == whole.stability
        assert equal(lora(resumed.model), weights), stop


OPTIMISERS = [("freeze", name) for name in ("adamw_torch", "sgd", "adafactor", "rmsprop")]


@pytest.mark.parametrize(("action", "optim"), [*OPTIMISERS, ("remove", "adamw_torch")])
def test_exactly_the_modules_that_are_kept_change_after_the_freeze(action, optim, tmp_path):
    callback, seen = freezing(action=action), Snapshots()
    options = {"optim": optim} | ({"optim_args": "momentum=0.9"} if optim == "sgd" else {})
    trainer = run(SFTTrainer, tmp_path, callback, seen, **options)
    names = {module.name for module in callback.ranking.modules}
    assert len(names) == NUM_MODULES
    assert changed_modules(seen.after[FREEZE_STEP - 1], seen.after[FREEZE_STEP]) == names
    kept = set(callback.selection.names)
    for step in range(FREEZE_STEP, NUM_STEPS):
        assert changed_modules(seen.after[step], seen.after[step + 1]) == kept
    worst = {module.name for module in callback.ranking.ordered()[-4:]}
    assert worst == set(callback.frozen) == names - kept
    trainer.save_model(str(tmp_path / "saved"))
    assert updated_modules(tmp_path / "saved") == (kept if action == "remove" else names)
    assert trainable(trainer.model) == kept
    assert sum(map(bool, trainer.optimizer.state.values())) == 2 * (NUM_MODULES - 4)
    assert Ranking.load(tmp_path / f"checkpoint-{NUM_STEPS}") == callback.ranking
    assert not (tmp_path / "checkpoint-6" / "ranking.json").exists()


def trainable(model):
    """Modules with a trained LoRA matrix; nothing else may be trained."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert all(".lora_" in name for name in names)
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("kind", ["DPO", "KTO", "ORPO", "Reward", "GRPO"])
def test_trainers_that_switch_adapters_in_their_loss_train_nothing_that_is_frozen(kind):
    """PEFT thaws an adapter whenever it is switched on again, as after each reference pass."""
    trainer = build(kind, "config", is_trained=False, is_moved=False, max_steps=5)
    callback, snapshots = FreezeUnimportant(0.5, mask_batches=1, max_steps=3), Snapshots()
    trainer.add_callback(callback)
    trainer.add_callback(snapshots)
    trainer.train()
    after = snapshots.after
    assert changed_modules(after[3], after[5]) == set(callback.selection.names)
    assert {name for name in after[5] if ".ref." in name} == set()
    with trainer.model.disable_adapter():  # from now on PEFT's switches are its own again
        pass
    trainer.model.set_adapter("default")
    weights = trainer.model.named_parameters()
    assert all(weight.requires_grad for name, weight in weights if "lora_" in name)


RANKED_INSIDE = [
    (SFTTrainer, "elimination", {}),
    (WithOwnLoss, "elimination", {}),
    (WithOwnLoss, "ila", {"mask_steps": 3}),
    (SFTTrainer, "adalora", {"mask_steps": 3}),
    (WithOwnLoss, "gradient-norm", {}),
    (SFTTrainer, "eva", {}),
]


@pytest.mark.parametrize(("kind", "method", "steps"), RANKED_INSIDE)
def test_until_the_freeze_takes_effect_the_run_is_the_same(kind, method, steps, tmp_path):
    """The ranking leaves no trace: the next step sees the same batch, dropout and gradients."""
    callback = freezing(method=method, mask_dataset=None, max_steps=FREEZE_STEP + 1, **steps)
    with_it, without = Snapshots(), Snapshots()
    options = {"max_grad_norm": 0.0, "logging_steps": 1}  # else clipping sees fewer gradients
    options |= {"max_steps": FREEZE_STEP + 2, "save_strategy": "no"}
    first = run(kind, tmp_path / "a", callback, with_it, **options)
    second = run(kind, tmp_path / "b", without, **options)
    for step in range(FREEZE_STEP + 1):
        assert equal(with_it.after[step], without.after[step])
    after, plain = with_it.after[FREEZE_STEP + 1], without.after[FREEZE_STEP + 1]
    assert changed_modules(plain, after) == set(callback.frozen)
    mine, others = (
        [row | {"grad_norm": None} for row in trainer.state.log_history[: FREEZE_STEP + 1]]
        for trainer in (first, second)
    )
    assert mine == others
    assert with_it.has_own_loader == without.has_own_loader == [True] * (FREEZE_STEP + 2)


NONSENSE = [
    ({"window": 0}, "`window` must be at least 1, got 0"),
    ({"epsilon": -1.0}, "`epsilon` must be at least 0, got -1.0"),
    ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
]


@pytest.mark.parametrize(("values", "message"), NONSENSE)
def test_rules_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StabilityOptions(**values)


@pytest.mark.parametrize(("max_steps", "expected"), [(None, NUM_STEPS // 2), (3, 3), (13, 13)])
def test_a_loss_that_is_never_stable_is_ranked_at_the_cap(max_steps, expected, tmp_path):
    callback = freezing(max_steps=max_steps, window=2, epsilon=0.0)
    run(Trainer, tmp_path, callback, save_strategy="no")
    assert (callback.frozen_at_step, callback.reason) == (expected, "max_steps")


def test_a_run_that_ends_too_early_says_that_nothing_was_frozen(tmp_path):
    class StopEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    callback = freezing()
    with pytest.warns(UserWarning, match="nothing was frozen: training ended at step 3 before"):
        run(Trainer, tmp_path, callback, StopEarly())
    assert (callback.ranking, callback.frozen) == (None, ())


@pytest.mark.parametrize("action", ["freeze", "remove"])
def test_the_best_checkpoint_is_one_of_the_shape_that_was_asked_for(action, tmp_path):
    """The loss is made to look best before the freeze."""

    class BestAtFour(Trainer):
        def evaluate(self, *arguments, **options):
            metrics = super().evaluate(*arguments, **options)
            metrics["eval_loss"] = float(abs(self.state.global_step - 4))
            return metrics

    callback, seen = freezing(action=action), Snapshots()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = run(BestAtFour, tmp_path, callback, seen, **best)
    best = {"freeze": 4, "remove": FREEZE_STEP}[action]  # removed ones must not come back
    assert trainer.state.best_global_step == best
    assert equal(lora(trainer.model), seen.after[best])
    kept = set(callback.selection.names)
    assert trainable(trainer.model) == kept
    trainer.save_model(str(tmp_path / "saved"))
    assert (updated_modules(tmp_path / "saved") == kept) == (action == "remove")


def test_a_callback_serves_run_after_run_and_a_trainer_goes_on_from_its_checkpoint(tmp_path):
    callback = freezing()
    first = run(Trainer, tmp_path / "a", callback)
    weights, found = lora(first.model), callback.frozen
    first.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    assert equal(lora(first.model), weights)
    second = run(Trainer, tmp_path / "b", callback)
    assert callback.frozen == found
    assert equal(lora(second.model), weights)


def test_a_checkpoint_of_a_run_without_the_callback_can_take_it_up(tmp_path):
    callback = freezing()
    run(Trainer, tmp_path, callback, resume=killed(tmp_path, after=2))
    assert callback.frozen_at_step == FREEZE_STEP  # measured at steps 4 and 8


def test_what_cannot_work_is_refused_before_any_step(tmp_path):
    with pytest.raises(ConfigError, match="none is on the call stack; give it as `trainer`"):
        trainer_of(freezing())
    for fraction in (0.0, 1.0):
        message = f"`freeze_fraction` must be above 0 and below 1, got {fraction}"
        with pytest.raises(ConfigError, match=message):
            freezing(freeze_fraction=fraction)
    for callbacks, message in (
        ([freezing(max_steps=NUM_STEPS)], "must be below the run's 14 steps, got 14; leave it"),
        ([freezing(freeze_fraction=0.01)], "at least one of the adapter's 14 modules"),
        ([freezing(), freezing()], "must hold one FreezeUnimportant at most, got 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(Trainer, tmp_path, *callbacks)
    args = make(Trainer, tmp_path).args
    plain = Trainer(tiny_llama(), args, train_dataset=data(), callbacks=[freezing()])
    with pytest.raises(ModelError, match="must carry a LoRA adapter, got a plain LlamaForCausalLM"):
        plain.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))


def test_a_checkpoint_keeps_the_callback_and_refuses_another_freeze(tmp_path):
    checkpoint = killed(tmp_path, freezing(), after=10)
    for options, message in (
        ({"freeze_fraction": 0.5}, "`freeze_fraction` must be 0.25 as in the checkpoint"),
        ({"action": "remove"}, "`action` must be freeze as in the checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(Trainer, tmp_path, freezing(**options), resume=checkpoint)
    callback, restored = freezing(), {"restore_callback_states_from_checkpoint": True}
    trainer = run(Trainer, tmp_path, callback, resume=checkpoint, **restored)
    assert callback in trainer.callback_handler.callbacks
    assert callback.frozen_at_step == FREEZE_STEP


@pytest.mark.filterwarnings("ignore:the update of every module is zero")  # it ranks at once
def test_an_optimiser_that_moves_frozen_matrices_is_caught(tmp_path):
    class Stubborn(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.99)

    trainer = make(Trainer, tmp_path)
    trainer.optimizer = Stubborn(trainer.model.parameters(), lr=0.1)
    trainer.add_callback(freezing(trainer=trainer))
    with pytest.raises(GuardError, match="frozen weights must not change, but 4 LoRA matrices"):
        trainer.train()
    assert trainer.state.global_step == FREEZE_STEP + 1
