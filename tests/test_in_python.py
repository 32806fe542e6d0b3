# SPDX-License-Identifier: Apache-2.0
"""What notebooks and scripts call: verify_ranking, tables and charts of a ranking."""

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from keylayers import (
    KeylayersError,
    curve_chart,
    mask_curve,
    module_weights,
    rank_modules,
    ranking_chart,
    ranking_table,
    verify_ranking,
)
from keylayers.commands.console import PIPE_WIDTH, ConsoleProgress, stdout
from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.report import source
from keylayers.report.figures import draw_figures, drawn_chart
from keylayers.report.source import Source
from keylayers.updates import adapter_updates
from scored import PLANTED, data, everything, noisy, planted, trainer_of

from rankings import ranking_of, verification_of
from tiny_models import state_of, tiny_llama, unchanged

FEW = {"points": 4, "random_orders": 2}
PARTS = {"part_scores": (3.0, 1.0), "part_parameters": (2, 2)}


def test_a_verification_is_the_mask_curve_of_the_ranking_and_leaves_no_trace():
    trainer, held_out = planted(), data(8)
    ranking = rank_modules(trainer, "update-norm")
    assert ranking.ordered()[0].name == PLANTED
    with unchanged(trainer, everything):
        found = verify_ranking(trainer, ranking, held_out, margin=0.1, **FEW)
    order = [module.name for module in ranking.ordered()]
    updates = adapter_updates(trainer.model)
    assert found.best_first == mask_curve(trainer, updates, order, held_out, num_points=4)
    worst = mask_curve(trainer, updates, order[::-1], held_out, num_points=4)
    assert found.worst_first == worst
    assert len(found.random) == 2
    assert found.is_of(ranking)
    assert found.recommendation.num_modules == found.best_first.counts[1]
    assert (found.made_by.loss_unit, found.made_by.trainer) == ("nats per token", "Trainer")
    assert found.provenance["options"]["margin"] == found.margin == 0.1


def test_a_full_fine_tune_is_verified_against_the_weights_before_it():
    model, held_out = tiny_llama(), data(8)
    trainer = trainer_of(model, max_steps=4, learning_rate=1e-3)
    before = module_weights(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    base = trainer.evaluate(held_out)["eval_loss"]
    trainer.train()
    ranking = rank_modules(trainer, "update-norm", base_weights=before)
    with unchanged(model, state_of):
        found = verify_ranking(trainer, ranking, held_out, base_weights=before, **FEW)
    tuned = trainer.evaluate(held_out)["eval_loss"]
    assert abs(base - tuned) > 1e-3
    assert found.best_first.losses[0] == pytest.approx(base, rel=1e-5)
    assert found.best_first.losses[-1] == pytest.approx(tuned, rel=1e-5)


# Options of `verify_ranking` on a ranking of other modules -> the error and its text
REFUSED = [
    ({}, RankingError, "the update must be of every module of the ranking, but 2 of 2 are not"),
    ({"points": 1}, ConfigError, "`points` must be at least 2, got 1"),
    ({"random_orders": 0}, ConfigError, "`random_orders` must be at least 1, got 0"),
    ({"margin": 1.0}, ConfigError, "`margin` must be a share from 0 to below 1, got 1.0"),
    ({"eval_batch_size": 8}, TypeError, "eval_batch_size"),  # the trainer's own
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_what_cannot_be_verified_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        verify_ranking(noisy(), ranking_of([1.0, 2.0]), data(8), **options)


def test_a_table_has_the_modules_best_first_and_says_what_a_budget_takes():
    ranking = ranking_of([1.0, 3.0, None, 1.9], errors=[0.1, 0.1, None, 0.6], num_parameters=7)
    assert repr(ranking) == "<Ranking of 4 modules, by hand>"
    table = ranking_table(ranking, budget=2)
    assert list(table.columns) == [
        *("rank", "module", "block", "projection", "score", "error", "parameters"),
        *("selected", "decided"),
    ]
    names = [module.name for module in ranking.ordered()]
    assert list(table["module"]) == names
    assert list(table["rank"]) == [1, 2, 3, pd.NA]
    assert list(table["selected"]) == [True, True, False, False]
    # The cut is at 1.45.
    assert list(table["decided"]) == [True, False, True, pd.NA]
    assert list(table["parameters"]) == [7] * 4


def test_a_table_of_parts_has_the_lora_ranks():
    modules = (
        RankedModule("layers.0.a", 0, "a", 10, 4.0, **PARTS),
        RankedModule("layers.1.a", 1, "a", 10, 4.0, **PARTS),
    )
    ranking = Ranking(modules, "by hand", "part")
    assert repr(ranking) == "<Ranking of 4 parts of 2 modules, by hand>"
    table = ranking_table(ranking, budget=3)
    assert list(table["lora_rank"]) == [2, 1]
    assert "decided" not in table


def without_counts(svg):
    """vl-convert numbers the gradients of all charts that a process draws."""
    return re.sub(rb"gradient_\d+", b"gradient", svg)


def test_charts_are_those_of_figures():
    ranking = ranking_of([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    found = verification_of(ranking)
    paths = [Path("heatmap.svg"), Path("curve.svg")]
    drawn = draw_figures([Source("out", "out", ranking, found, is_stale=False)], paths, 2)
    charts = (ranking_chart(ranking, 2), curve_chart(ranking, found, 2))
    for chart, path in zip(charts, paths, strict=True):
        assert without_counts(drawn_chart(chart, ".svg")) == without_counts(drawn[path])


def test_charts_refuse_the_verification_of_another_ranking_and_name_the_extra(monkeypatch):
    ranking = ranking_of([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    with pytest.raises(RankingError, match="it is of another one; verify this ranking"):
        curve_chart(replace(ranking, method="other"), verification_of(ranking))
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(KeylayersError, match=r"need altair, vl_convert, .*keylayers\[report\]"):
        ranking_chart(ranking)


def test_a_pipe_is_no_terminal_where_a_notebook_asks_for_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernels do
    console = stdout()
    assert console.is_terminal
    assert console.width == PIPE_WIDTH
    progress = ConsoleProgress()
    with progress.stage("training", 3) as on_step:
        on_step(3, 1.0)
    assert "training: 3 steps" in capsys.readouterr().err
