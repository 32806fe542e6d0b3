# SPDX-License-Identifier: Apache-2.0
"""Batches of trainers that are not about labelled tokens: pairs, neighbours, samples."""

from itertools import islice

import pytest
import torch
from datasets import Dataset

from trainers import KINDS, NUM_ROWS, build, num_letters


def first_batches(trainer, count, seed=0):
    from keylayers.mask.trainer_loss import TrainerLoss

    source = TrainerLoss(trainer)
    with source.quiet():
        torch.manual_seed(seed)
        return list(islice(source.batches(), count))


def test_batches_of_kto_keep_their_neighbours_and_come_in_other_orders(tmp_path):
    trainer = build("kto", tmp_path)
    in_order = {str(batch["KL_input_ids"]) for batch in trainer.get_train_dataloader()}
    assert len(in_order) == NUM_ROWS / 4
    epochs = [
        [str(batch["KL_input_ids"]) for batch in first_batches(trainer, 3, seed)]
        for seed in range(6)
    ]
    assert all(set(epoch) == in_order for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_shorter_block_stays_last():
    from keylayers.mask.trainer_loss import _in_other_blocks

    torch.manual_seed(0)
    rows = [_in_other_blocks(Dataset.from_dict({"x": range(11)}), 4)["x"] for _ in range(8)]
    assert {tuple(one) for one in rows} == {
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        (4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10),
    }


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_the_mean_over_batches_is_the_mean_over_pairs(kind, tmp_path):
    from keylayers.mask.trainer_loss import TrainerLoss, batch_losses

    trainer = build(kind, tmp_path, is_ready=True)
    if kind == "dpo":
        trainer.model.delete_adapter("ref")
    data = trainer.eval_dataset["other"].select(range(10))
    source = TrainerLoss(trainer)
    found = []
    for size in (4, 1):
        trainer.args.per_device_eval_batch_size = size
        with source.quiet():
            found.append(batch_losses(source, list(trainer.get_eval_dataloader(data))))
    assert found[0].weights == (8.0, 8.0, 4.0)
    assert found[0].mean == pytest.approx(sum(found[1].losses) / 10, rel=1e-5)


def test_a_class_for_each_row_is_no_label_of_a_token():
    from keylayers.mask.trainer_loss import _weight, has_labelled_tokens

    classes = {"labels": torch.tensor([0, 1, 1]), "input_ids": torch.zeros(3, 7)}
    assert not has_labelled_tokens(classes)
    assert _weight(classes) == 3.0
    tokens = {"input_ids": torch.zeros(2, 3), "labels": torch.tensor([[5, -100, 6], [-100, 1, 2]])}
    assert _weight(tokens) == 3.0  # the first label of a row is nobody's next token
    assert _weight({"num_items": torch.tensor(4), "texts": ["a", "b"]}) == 2.0


def test_completions_are_sampled_anew_for_each_pass_by_the_model_as_masked(tmp_path):
    """Also from a trainer that stopped in the middle of what it had sampled."""
    import keylayers

    settings = {"steps_per_generation": 2, "max_steps": 1}
    trainer = build("grpo", tmp_path, is_ready=True, **settings)
    trainer.train()
    assert trainer._step == 1
    kept = trainer._buffered_inputs
    assert kept is not None
    sampled = []

    def reward(completions, **columns):
        sampled.append(str(completions))
        return num_letters(completions)

    trainer.reward_funcs = [reward]
    ranking = keylayers.rank_modules(trainer, keylayers.MaskOptions(mask_batches=2))
    assert len(sampled) == len(set(sampled)) == len(ranking.provenance["mask"]["losses"])
    assert trainer._step == 1
    assert trainer._buffered_inputs is kept or len(trainer._buffered_inputs) == len(kept)


def test_prompts_that_are_repeated_for_later_steps_are_taken_once(tmp_path):
    settings = {"steps_per_generation": 2, "generation_batch_size": None, "num_iterations": 2}
    trainer = build("grpo", tmp_path, **settings)
    prompts = [str([row["prompt"] for row in batch]) for batch in first_batches(trainer, 3)]
    assert len(set(prompts)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_watchers_see_the_policys_pass_only_and_no_padding(kind, tmp_path):
    from keylayers.mask.probe import observed_inputs, observed_padding
    from keylayers.mask.scoring import scoring
    from keylayers.options import MaskOptions
    from keylayers.updates import lora_updates

    trainer = build(kind, tmp_path, is_ready=True)
    updates = lora_updates(trainer.model)
    calls, shares = [], []

    def see(index, x):
        calls.append(index)
        shares.append(float(is_token(x).float().mean()))

    with scoring(trainer, updates, MaskOptions(mask_batches=1)) as task:
        with (
            observed_padding(trainer.model) as is_token,
            observed_inputs(updates, see),
        ):
            task.look(0.0, task.batches[0])
        assert all(parameter.requires_grad for parameter in task.gates.parameters())
    assert calls == list(range(len(updates)))
    if kind != "grpo":  # whether its first prompts are of different lengths is left to chance
        assert all((share < 1) == (kind != "own loss") for share in shares)


REFUSED = [
    ("dpo", "fisher", "needs one row an example"),
    ("reward", "fisher", "needs one row an example"),
    ("orpo", "eva", "needs batches that hold `input_ids`"),
    ("grpo", "leave-one-out", "must go by gradients for a GRPOTrainer"),
    ("grpo", "shapley", "must go by gradients"),
    ("grpo", "path", "must go by gradients"),
]


@pytest.mark.parametrize(("kind", "method", "message"), REFUSED)
def test_what_cannot_be_exact_is_refused_with_a_reason(kind, method, message, tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    trainer = build(kind, tmp_path, is_ready=True)
    with pytest.raises(ConfigError, match=message):
        keylayers.rank_modules(trainer, keylayers.MaskOptions(method=method))


@pytest.mark.parametrize("method", ["lora-drop", "cka", "eva", "adalora", "ila", "path"])
def test_other_methods_work_on_pairs(method, tmp_path):
    import math

    import keylayers

    options = {"ila": {"mask_steps": 2}, "adalora": {"mask_steps": 6}}.get(
        method, {"mask_batches": 1}
    )
    trainer = build("dpo", tmp_path, is_ready=True)
    ranking = keylayers.rank_modules(trainer, keylayers.MaskOptions(method=method, **options))
    assert all(math.isfinite(module.score) for module in ranking.modules)


def test_examples_to_score_on_must_be_prepared_like_the_trainers_own(tmp_path):
    import keylayers
    from keylayers.errors import DataError

    trainer = build("dpo", tmp_path, is_ready=True)
    options = keylayers.MaskOptions(mask_batches=1)
    raw = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    with pytest.raises(DataError, match=r"lacks prompt_ids, chosen_ids, rejected_ids"):
        keylayers.rank_modules(trainer, options, mask_dataset=raw)
    prepared = trainer.eval_dataset["other"]
    assert keylayers.rank_modules(trainer, options, mask_dataset=prepared).modules
