# SPDX-License-Identifier: Apache-2.0
"""Every method against a case worked out by hand or an independent implementation."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import KappaTuneSelector
from torch import nn

from keylayers.scores.adalora import TARGET_RANK
from keylayers.scores.cka import linear_cka
from keylayers.scores.eva import MEAN_RANK
from keylayers.scores.ila import standard_errors
from keylayers.scores.spectrum import signal_to_noise
from scored import (
    batches_of,
    noisy,
    noisy_model,
    score,
    scores_of,
    slopes_of,
    trainer_of,
    written_out,
)

from tiny_models import tiny_llama


def test_one_step_of_ila_is_the_formula():
    one_step = {"mask_optimizer": "sgd", "mask_learning_rate": 1.0, "mask_steps": 1}
    learned = score(noisy(), "ila", initial_score=0.3, **one_step)
    (batch,) = batches_of(noisy(), 1)
    gates = torch.full((14,), 0.3).sigmoid()
    gradient = slopes_of(gates, batch) * gates * (1 - gates)
    assert learned.losses[0] == pytest.approx(written_out(gates, batch).item(), rel=1e-5)
    assert list(learned.scores) == pytest.approx((0.3 - gradient).tolist(), abs=1e-6)
    assert gradient.abs().max() > 1e-4


def test_standard_errors_of_ila_match_the_spread_of_many_runs():
    generator = torch.Generator().manual_seed(0)
    num_runs, num_steps = 400, 60
    drift = torch.linspace(1.0, 0.2, num_steps)[:, None]
    noise = 0.5 * torch.randn(num_steps, num_runs, generator=generator)
    paths = torch.cat([torch.zeros(1, num_runs), (drift + noise).cumsum(dim=0)])
    estimates = standard_errors(paths).square().mean().sqrt()
    assert float(estimates) == pytest.approx(float(paths[-1].std()), rel=0.1)
    assert standard_errors(paths[:20]) is None


def test_depth_by_hand_and_a_shuffle_by_seed():
    values, others = (score(noisy(), "random", mask_seed=seed).scores for seed in (0, 1))
    assert 0 <= min(values) < max(values) < 1
    assert values != others
    model = get_peft_model(tiny_llama(num_blocks=4), LoraConfig(r=2, target_modules=["o_proj"]))
    trainer = trainer_of(model)
    found = [score(trainer, method).scores for method in ("first", "last", "middle")]
    assert found == [(0.0, -1.0, -2.0, -3.0), (0.0, 1.0, 2.0, 3.0), (-1.5, -0.5, -0.5, -1.5)]


def test_update_norm_is_that_of_the_merged_weight():
    values = scores_of(noisy(), "update-norm")
    base, merged = tiny_llama(), noisy_model().merge_and_unload()
    moved = {
        name: merged.get_submodule(name).weight - base.get_submodule(name).weight for name in values
    }
    assert values == pytest.approx({name: w.norm().item() for name, w in moved.items()}, rel=1e-4)


def gradients(batch):
    """Module name -> gradient of the base model's weight, by autograd."""
    base = tiny_llama().train()
    base(**batch).loss.backward()
    return {name: base.get_submodule(name).weight.grad for name in scores_of(noisy(), "first")}


def test_gradient_norms_are_those_of_autograd_on_the_base_model():
    values = scores_of(noisy(), "gradient-norm")
    first, second = map(gradients, batches_of(noisy(), 2))
    norms = {name: (first[name].norm() + second[name].norm()).item() / 2 for name in first}
    assert values == pytest.approx(norms, rel=1e-4)
    by_block = scores_of(noisy(), "aletheia")
    for block in (0, 1):
        names = [name for name in values if f"layers.{block}." in name]
        total = sum(norms[name] for name in names)
        assert [by_block[name] for name in names] == pytest.approx([total] * 7, rel=1e-4)


def test_fisher_is_the_mean_squared_gradient_of_single_examples():
    values = scores_of(noisy(), "fisher", mask_batches=1)
    (batch,) = batches_of(noisy(), 1)
    rows = [
        gradients({key: value[row : row + 1] for key, value in batch.items()}) for row in range(4)
    ]
    traces = {name: sum(row[name].square().sum().item() for row in rows) / 4 for name in values}
    assert values == pytest.approx(traces, rel=1e-4)  # rows of one length count alike


def test_the_signal_to_noise_ratio_by_hand():
    # σ = 10, 4, 3, 2, 1: quartiles 2 and 4, noise 2 / 1.349 · (1 + 1) = 2.965; 10, 4, 3 are signal
    found = signal_to_noise(torch.diag(torch.tensor([10.0, 4, 3, 2, 1])))
    assert found == pytest.approx(17 / 3 / 10)
    assert signal_to_noise(torch.eye(4)) == math.inf  # nothing is below a threshold of zero


def test_spectrum_ranks_inside_each_kind():
    values, base = scores_of(noisy(), "spectrum"), tiny_llama()
    for kind in ("q_proj", "down_proj"):
        pair = [name for name in values if name.endswith(kind)]
        ratios = [signal_to_noise(base.get_submodule(name).weight.detach()) for name in pair]
        assert sorted(values[name] for name in pair) == [0.5, 1.0]
        assert (values[pair[0]] > values[pair[1]]) == (ratios[0] > ratios[1])


def test_kappatune_is_pefts():
    values = scores_of(noisy(), "kappatune")
    selector = KappaTuneSelector(tiny_llama(), show_progress=False)
    best = [name for name in selector.get_best_targets() if name in values]
    assert sorted(values, key=lambda name: -values[name]) == best
    kappas = selector._condition_numbers
    assert values == pytest.approx({name: -kappas[name] for name in values}, rel=1e-5)


def test_plop_compares_feature_norms_with_those_of_random_inputs():
    name = "model.layers.1.mlp.down_proj"
    value = scores_of(noisy(), "plop", mask_batches=1)[name]
    (batch,) = batches_of(noisy(), 1)
    base, seen = tiny_llama(), {}
    base.get_submodule(name).register_forward_hook(
        lambda _, x, __: seen.update(x=x[0].flatten(0, 1))
    )
    base(**batch)
    weight = base.get_submodule(name).weight
    unit = nn.functional.normalize(seen["x"], dim=-1)
    noise = nn.functional.normalize(torch.randn(20_000, weight.shape[1]), dim=-1)
    ratio = (unit @ weight.T).norm(dim=-1).mean() / (noise @ weight.T).norm(dim=-1).mean()
    assert value == pytest.approx(-ratio.item(), rel=0.05)  # mean norm against root mean square


def test_block_influence_from_hidden_states():
    values = scores_of(noisy(), "block-influence", mask_batches=1)
    (batch,) = batches_of(noisy(), 1)
    states = tiny_llama()(**batch, output_hidden_states=True).hidden_states
    cosine = nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean().item()
    assert values["model.layers.0.mlp.up_proj"] == pytest.approx(1 - cosine, rel=1e-4)


def test_linear_cka_against_centred_gram_matrices():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(9, width, generator=generator) for width in (4, 6))
    centre = torch.eye(9) - 1 / 9
    grams = [centre @ one @ one.T @ centre for one in (x, y)]
    hsic = [[(a * b).sum().item() for b in grams] for a in grams]
    expected = hsic[0][1] / math.sqrt(hsic[0][0] * hsic[1][1])
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0, rel=1e-5)
    assert linear_cka(torch.ones(9, 4), y) == 0.0


def test_adalora_leaves_its_budget_and_eva_shares_out_its_own():
    ranks = score(noisy(), "adalora").scores
    assert sum(int(rank) for rank in ranks) == TARGET_RANK * 14
    values = scores_of(noisy(), "eva")
    assert sum(values.values()) == MEAN_RANK * 14
    block = "model.layers.0.self_attn."
    assert values[block + "q_proj"] == values[block + "k_proj"]  # the same inputs


def test_leave_one_out_from_models_with_one_update_set_to_zero():
    found = score(noisy(), "leave-one-out", mask_batches=1)
    (batch,) = batches_of(noisy(), 1)
    whole, *without = (
        written_out(gates, batch).item()
        for gates in torch.cat([torch.ones(1, 14), torch.ones(14, 14) - torch.eye(14)])
    )
    assert found.scores == pytest.approx([loss - whole for loss in without], abs=1e-5)


def test_shapley_values_of_two_players_mix_their_two_orders():
    values = scores_of(noisy(), "shapley", granularity="block", mask_batches=1, permutations=20)
    first, second = (values[f"model.layers.{block}.mlp.up_proj"] for block in (0, 1))
    (batch,) = batches_of(noisy(), 1)
    neither, one, other, both = (
        written_out(torch.tensor([left] * 7 + [right] * 7), batch).item()
        for left, right in ((0, 0), (1, 0), (0, 1), (1, 1))
    )
    alone, after = neither - one, other - both
    share = (first - after) / (alone - after)
    assert share == pytest.approx(round(20 * share) / 20, abs=1e-3)
    assert 0 < share < 1
    assert first + second == pytest.approx(neither - both, abs=1e-5)
