# SPDX-License-Identifier: Apache-2.0
"""When stage 1 ends: the rule on simulated losses, and what a record says against the weights."""

import numpy as np
import pytest
import torch
from scipy import stats

from commands import keylayers, read, weights_in
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.model.loading import load_adapter, load_model, load_tokenizer
from keylayers.model.options import ModelOptions
from keylayers.ranking.record import Stability
from keylayers.trainers.loss import BatchLosses
from keylayers.training.options import StabilityOptions
from keylayers.training.stability import NUM_EXAMPLES, LossHistory, StabilityWatch
from scored import everything
from trainers import DATA, build

from tiny_models import unchanged

EPSILON = 0.02
SPREAD = 0.03  # of what one window changes of an example's loss, in nats
BATCH_NOISE = 0.1  # standard error of the difference of two means over windows of batches
SEEDS = range(300)
SURE = 1e-3  # a right rule fails one of these tests in a thousand, whatever the seeds


def stops(falls, seed):
    """Whether the second measurement of the examples ends a training; seen are noisy losses."""
    draw = np.random.default_rng(seed)
    before = draw.normal(3.0, 1.0, NUM_EXAMPLES)  # examples differ far more than windows
    after = before - falls - draw.normal(0, SPREAD, NUM_EXAMPLES)
    history = LossHistory(StabilityOptions(epsilon=EPSILON))
    for step, losses in ((30, before), (60, after)):
        history.add(step, BatchLosses(tuple(losses.tolist()), (1.0,) * NUM_EXAMPLES))
    return history.is_stable


@pytest.mark.parametrize("fall", [-0.05, 0.0, 0.01, EPSILON, 0.03, 0.1])
def test_noisy_losses_end_as_often_as_students_t_says(fall):
    """The bound is below epsilon if (epsilon - mean) / error, noncentral t, is above the quantile.

    At a fall of exactly epsilon that is 5 %; for a slower fall it is less.
    """
    noncentral = (EPSILON - fall) * np.sqrt(NUM_EXAMPLES) / SPREAD
    quantile = stats.t.ppf(0.95, NUM_EXAMPLES - 1)
    chance = stats.nct.sf(quantile, NUM_EXAMPLES - 1, noncentral)
    count = sum(stops(fall, seed) for seed in SEEDS)
    assert stats.binomtest(count, len(SEEDS), min(1.0, chance)).pvalue > SURE
    if fall == EPSILON:
        assert chance == pytest.approx(0.05)
    if fall >= EPSILON:
        assert stats.binomtest(count, len(SEEDS), 0.05, "greater").pvalue > SURE


def test_means_of_two_windows_of_batches_end_a_slow_fall_too_often():
    """The rule that this one replaced; it ends at the first comparison, by luck."""
    draws = [np.random.default_rng(seed).normal(0.03, BATCH_NOISE) for seed in SEEDS]
    count = sum(abs(fall) < EPSILON for fall in draws)
    assert stats.binomtest(count, len(SEEDS), 0.05, "greater").pvalue < SURE


# Losses of two examples with 1 and 3 labels, at two steps -> improvement, and whether it is stable
CLEAN = [
    ((2.0, 2.0), (1.5, 1.5), 0.5, False),  # falling
    ((2.0, 2.0), (2.0, 2.0), 0.0, True),
    ((2.0, 2.0), (2.5, 2.5), -0.5, True),  # rising: more steps would overfit
    ((2.0, 2.0), (1.98, 1.98), 0.02, False),  # a bound of exactly epsilon is not below it
    ((2.0, 2.0), (2.0, 1.6), 0.3, False),  # 3/4 of the labels fell by 0.4
]


@pytest.mark.parametrize(("before", "after", "improvement", "is_stable"), CLEAN)
def test_examples_count_by_their_labels(before, after, improvement, is_stable):
    history = LossHistory(StabilityOptions(epsilon=EPSILON - 1e-12))
    history.add(1, BatchLosses(before, (1.0, 3.0)))
    assert not history.is_stable
    history.add(2, BatchLosses(after, (1.0, 3.0)))
    assert history.seen[-1].improvement_nats == pytest.approx(improvement)
    assert history.is_stable is is_stable
    again = LossHistory(history.stability)
    again.restore(history.state())
    assert (again.seen, again.record()) == (history.seen, history.record())


def test_one_example_gives_no_bound_and_never_ends_a_training():
    history = LossHistory(StabilityOptions(epsilon=1e9))
    history.add(1, BatchLosses((2.0,), (1.0,)))
    history.add(2, BatchLosses((2.0,), (1.0,)))
    assert history.seen[-1].upper_nats is None
    assert not history.is_stable
    assert Stability.model_validate(history.record()).why("max_steps") == "the cap is reached"


@pytest.mark.parametrize("kind", [kind for kind in DATA if kind != "GRPO"])
def test_a_measurement_leaves_no_trace(kind):
    trainer = build(kind, "config" if kind not in ("plain", "own loss") else "model")
    watch = StabilityWatch(trainer, StabilityOptions(window=1, epsilon=1e9))
    with unchanged(trainer, everything):
        assert not watch.see(1)
        assert watch.see(2)
    assert [each.improvement_nats for each in watch.history.seen] == [None, 0.0]


def test_a_trainer_that_samples_is_not_measured():
    watch = StabilityWatch(build("GRPO", "config"), StabilityOptions(window=1, epsilon=1e9))
    assert not watch.see(1)
    assert watch.history.seen == ()


def example_losses(tiny, adapter):
    """Loss and labels of each mask example, by transformers' own loss."""
    tokenizer = load_tokenizer(ModelOptions(model=str(tiny / "model")))
    mask = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64).mask
    model = load_adapter(load_model(ModelOptions(model=str(tiny / "model"))), str(adapter)).eval()
    found = []
    for row in mask:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss)
        found.append((loss, int((labels[:, 1:] != -100).sum())))
    return np.array(found).T


def test_the_record_says_what_the_weights_say_and_training_is_the_same(tiny, tmp_path):
    runs = {"rule": ("6", "1e-9"), "three": ("3", "0"), "six": ("6", "0")}
    for name, (steps, epsilon) in runs.items():
        more = ("--max-steps", steps, "--epsilon", epsilon, "--window", "3", "--warmup-steps", "0")
        more += ("--method", "update-norm", "--learning-rate", "0.02")
        more += ("--batch-size", "4", "--lora-rank", "4", "--output", tmp_path / name)
        assert (
            keylayers("rank", "--model", tiny / "model", "--data", tiny / "data.jsonl", *more) == 0
        )
    stage_1, plain = (read(tmp_path / name)["provenance"]["stage_1"] for name in ("rule", "six"))
    assert stage_1["losses"] == plain["losses"]
    assert plain["stability"]["measurements"] == []
    first, second = (weights_in(tmp_path / name / "adapter") for name in ("rule", "six"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (before, labels), (after, _) = (
        example_losses(tiny, tmp_path / name / "adapter") for name in ("three", "six")
    )
    seen = stage_1["stability"]["measurements"]
    assert [each["step"] for each in seen] == [3, 6]
    assert stage_1["stability"]["num_forward"] == 2 * len(labels)
    for each, losses in zip(seen, (before, after), strict=True):
        assert each["loss_nats"] == pytest.approx(np.average(losses, weights=labels), rel=1e-5)
    falls, share = before - after, labels / labels.sum()
    improvement = float(share @ falls)
    error = np.sqrt(np.var(share * (falls - improvement), ddof=1) * len(falls))
    upper = improvement + stats.t.ppf(0.95, len(falls) - 1) * error
    assert seen[1]["improvement_nats"] == pytest.approx(improvement, rel=1e-3)
    assert seen[1]["upper_nats"] == pytest.approx(upper, rel=1e-3)
