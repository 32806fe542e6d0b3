# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from datasets import Dataset

from test_mask_learning import PLANTED, data, planted_model, trainer_of


def test_the_area_by_hand():
    from keylayers.curve import MaskCurve

    # heights 1, 0.25, 0 over counts 0, 1, 4: 1 * 0.625 + 3 * 0.125, over 4
    assert MaskCurve((0, 1, 4), (3.0, 1.5, 1.0)).normalised_area == pytest.approx(0.25)
    assert MaskCurve((0, 1, 2), (1.0, 1.0, 1.0)).normalised_area is None
    assert MaskCurve((0, 1, 2), (1.0, 0.5, 2.0)).normalised_area is None


def test_the_curve_of_a_planted_module_falls_when_it_enters():
    from keylayers.mask.curve import mask_curve
    from keylayers.updates import lora_updates

    trainer = trainer_of(planted_model())
    updates = lora_updates(trainer.model)
    names = [update.module.name for update in updates]
    others = [name for name in names if name != PLANTED]
    first = mask_curve(trainer, updates, [PLANTED, *others], data())
    last = mask_curve(trainer, updates, [*others, PLANTED], data())
    assert first.counts == tuple(range(15))
    assert first.losses[0] == last.losses[0] > first.losses[1]
    assert set(first.losses[1:]) == {first.losses[1]}
    assert set(last.losses[:-1]) == {first.losses[0]}
    assert last.losses[-1] == first.losses[1]
    assert first.normalised_area == pytest.approx(0.5 / 14)
    assert last.normalised_area == pytest.approx(13.5 / 14)


def test_few_points_reach_from_none_to_all():
    from keylayers.mask.curve import mask_curve
    from keylayers.updates import lora_updates

    trainer = trainer_of(planted_model())
    updates = lora_updates(trainer.model)
    names = [update.module.name for update in updates]
    curve = mask_curve(trainer, updates, names, data(), num_points=5)
    assert curve.counts == (0, 4, 7, 10, 14)


def test_the_held_out_loss_is_a_mean_over_tokens_not_over_batches():
    from keylayers.evaluation.loss import held_out_loss

    trainer = trainer_of(planted_model())
    rows = data(6)["input_ids"]
    labels = [row[:6] + [-100] * 6 for row in rows[:3]] + rows[3:]
    mixed = Dataset.from_dict({"input_ids": rows, "labels": labels})
    total = count = 0.0
    trainer.model.eval()
    for row, label in zip(rows, labels, strict=True):
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row])).logits[0, :-1]
        target = torch.tensor(label[1:])
        total += float(
            torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        )
        count += int((target != -100).sum())
    trainer.model.train()
    assert held_out_loss(trainer, mixed) == pytest.approx(total / count, rel=1e-5)
    assert trainer.model.training
