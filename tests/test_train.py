# SPDX-License-Identifier: Apache-2.0
"""`keylayers train`: exactly the selection is trained, and anybody can load the result."""

import pytest
from transformers import AutoTokenizer

from commands import (
    PLAIN_PEFT,
    PLAIN_TRANSFORMERS,
    STEPS,
    best,
    changed_weights,
    fresh_process,
    keylayers,
    record_of,
    updated_modules,
)
from keylayers.commands.run_train import control_modules
from keylayers.data.templates import BUILT_IN
from tiny_files import NUM_MODULES

from rankings import ranking_of


def test_an_adapter_on_exactly_the_best_modules_that_plain_peft_loads(ranked, tmp_path, capsys):
    output = tmp_path / "t"
    assert keylayers("train", "--ranking", ranked, "--budget", "0.3", "--output", output) == 0
    names = set(fresh_process(PLAIN_PEFT, output))
    assert names == updated_modules(output) == best(ranked, 6)  # 6.3 of 21
    out = capsys.readouterr().out
    for label in ("base model", "selected", "all (stage 1 of the ranking)"):
        assert label in out
    record = record_of(output)
    assert set(record["selection"]["modules"]) == names
    assert record["selection"]["num_candidates"] == NUM_MODULES
    base, selected = record["results"][:2]
    assert (base["num_trained_parameters"], selected["num_steps"]) == (0, 6)  # as stage 1
    assert record["options"]["lora_rank"] == 4  # as stage 1


@pytest.mark.parametrize(("budget", "count"), [(("--budget", 20), 20), (("--freeze", 0.25), 16)])
def test_larger_selections_stay_exact(ranked, tmp_path, budget, count):
    """PEFT condenses long lists of names before saving; a regular expression is kept."""
    options = ("--ranking", ranked, *budget, "--steps", "1", "--output", tmp_path / "t")
    assert keylayers("train", *options) == 0
    assert set(fresh_process(PLAIN_PEFT, tmp_path / "t")) == best(ranked, count)


def test_the_chat_template_that_was_trained_with_is_saved_and_replaced(tiny, ranked, tmp_path):
    options = ("--ranking", ranked, "--budget", "2", "--steps", "1", "--output", tmp_path / "t")
    assert keylayers("train", *options, "--chat-template", "alpaca") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "t").chat_template == BUILT_IN["alpaca"]
    assert keylayers("train", *options) == 0
    own = AutoTokenizer.from_pretrained(tiny / "model").chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "t").chat_template == own


def test_a_full_update_changes_exactly_the_selected_weights(tiny, ranked, tmp_path, capsys):
    options = ("--ranking", ranked, "--budget", "5", "--update", "full", *STEPS)
    assert keylayers("train", *options, "--output", tmp_path / "t") == 0
    changed = changed_weights(tiny / "model", tmp_path / "t")
    assert changed == {f"{name}.weight" for name in best(ranked, 5)}
    assert fresh_process(PLAIN_TRANSFORMERS, tmp_path / "t") == ["torch.bfloat16"]
    assert "checkpoint written to" in capsys.readouterr().out


def test_controls_are_trained_like_the_selection(ranked, tmp_path):
    options = ("--ranking", ranked, "--budget", "0.3", *STEPS, "--output", tmp_path / "t")
    assert keylayers("train", *options, "--controls", "all", "random", "worst") == 0
    rows = {row["label"]: row for row in record_of(tmp_path / "t")["results"]}
    sizes = {"base model": 0, "selected": 6, "all": NUM_MODULES, "random": 6, "worst": 6}
    assert {label: rows[label]["num_modules"] for label in sizes} == sizes
    losses = {label: row["held_out_loss_nats"] for label, row in rows.items()}
    assert max(losses["all"], losses["selected"]) < losses["base model"]


def test_controls_are_as_large_as_the_selection_and_follow_their_names():
    ranking = ranking_of([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    selection = ranking.select(2)
    names = [module.name for module in ranking.modules]

    def chosen(control, seed=0):
        return list(control_modules(ranking, selection, control, seed))

    assert chosen("all") == names
    assert chosen("first") == names[:2]
    assert chosen("last") == names[-2:]
    assert chosen("worst") == [names[1], names[5]]
    draws = {tuple(chosen("random", seed)) for seed in range(20)}
    assert len(draws) > 5
    assert {len(draw) for draw in draws} == {2}
