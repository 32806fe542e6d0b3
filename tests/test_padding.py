# SPDX-License-Identifier: Apache-2.0
"""Scores depend on the tokens, not on padding or on how many rows share a batch."""

import pytest
from datasets import Dataset

from test_mask_learning import data, noisy_model, trainer_of
from test_scores import NAMES, by_name, score

NO_DATA = ["update-norm", "spectrum", "kappatune", "first", "last", "middle", "random"]
NEEDS_DATA = [name for name in NAMES if name not in NO_DATA]
NUM_ROWS = 24


def padded(rows, num_tokens):
    """The same rows with padding that neither attention nor the loss sees."""
    pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns = {name: rows[name] for name in ("input_ids", "labels")}
    columns["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
    return Dataset.from_dict(
        {name: [row + [pad[name]] * num_tokens for row in held] for name, held in columns.items()}
    )


@pytest.mark.parametrize("method", NEEDS_DATA)
def test_padding_changes_no_score(method):
    found = []
    for num_tokens in (0, 7):
        trainer = trainer_of(noisy_model())
        trainer.train_dataset = padded(data(NUM_ROWS), num_tokens)
        found.append(by_name(score(trainer, method)))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


# Means over examples or tokens. The others take a step or a point of a path per batch, or the norm
# of a batch.
MEANS = ["path", "leave-one-out", "fisher", "lora-drop", "eva", "plop", "block-influence", "cka"]


@pytest.mark.parametrize("method", MEANS)
def test_the_size_of_batches_changes_no_score(method):
    found = []
    for size in (4, 2):
        trainer = trainer_of(noisy_model())
        trainer.args.per_device_train_batch_size = size
        found.append(by_name(score(trainer, method, mask_batches=NUM_ROWS // size)))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
