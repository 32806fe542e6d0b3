# SPDX-License-Identifier: Apache-2.0
"""Every objective from the command line: rank, show, verify, train, and a plain load."""

import math
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from commands import (
    PLAIN_PEFT,
    best,
    changed_weights,
    complaint,
    file_for,
    fresh_process,
    keylayers,
    read,
    record_of,
    scores,
    verified_in,
)
from keylayers.data.preferences import FORMAT_OF
from keylayers.model.loading import load_model
from keylayers.model.options import ModelOptions, Objective
from keylayers.training.options import LOSS_UNITS
from prepared import PAIRS
from tiny_files import CHAT_TEMPLATE, NUM_MODULES, write_rows

OBJECTIVES = ("dpo", "kto", "orpo", "reward")
STEPS = 12
QUICK_STAGE_1 = ["--lora-rank", "2", "--lora-alpha", "4", "--learning-rate", "0.02"]
QUICK_STAGE_1 += ["--epsilon", "0", "--warmup-steps", "0"]
QUICK_STAGE_2 = ["--mask-batches", "1", "--batch-size", "4"]
QUICK = [*QUICK_STAGE_1, *QUICK_STAGE_2]
UNMOVED = {"dpo": math.log(2), "kto": 0.5}  # losses without a preference


def rank(tiny, data, objective, output, *more, steps=STEPS):
    options = ("--model", tiny / "model", "--data", file_for(data, objective), "--output", output)
    options += ("--objective", objective, *QUICK_STAGE_2)
    if not {"--adapter", "--tuned"} & set(more):
        options += (*QUICK_STAGE_1, "--max-steps", steps)
    return keylayers("rank", *options, *more)


def made_by(folder):
    return read(folder)["provenance"]


@pytest.fixture(scope="module")
def ranked(tiny, preferences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked")
    for objective in OBJECTIVES:
        assert rank(tiny, preferences, objective, folder / objective) == 0
    return {objective: folder / objective for objective in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_from_ranking_to_an_adapter_that_plain_peft_loads(
    ranked, tiny, objective, tmp_path, capsys
):
    folder = ranked[objective]
    ranking = read(folder)
    losses = ranking["provenance"]["held_out_loss_nats"]
    trained = ranking["provenance"]["stage_1"]["losses"]
    assert ranking["provenance"]["options"]["objective"] == objective
    assert sum(trained[-3:]) < 0.9 * sum(trained[:3])  # on examples seen again and again
    assert len({module["score"] for module in ranking["modules"]}) > NUM_MODULES / 2
    assert all(math.isfinite(loss) for loss in losses.values())
    if objective in UNMOVED:  # the reference is the base model, so the base has no preference
        assert losses["base"] == pytest.approx(UNMOVED[objective], abs=1e-6)
    capsys.readouterr()
    assert keylayers("show", folder) == 0
    assert LOSS_UNITS[objective] in capsys.readouterr().out
    short = ("--random-orders", "1", "--points", "3", "--eval-batch-size", "4")
    assert keylayers("verify", "--ranking", folder, *short) == 0
    verified = verified_in(folder)
    ends = [verified["best_first"]["losses"][place] for place in (0, -1)]
    assert ends == pytest.approx([losses["base"], losses["tuned"]], rel=1e-4)
    assert verified["provenance"]["options"]["objective"] == objective
    capsys.readouterr()
    tuned = tmp_path / "tuned"
    assert keylayers("train", "--ranking", folder, "--budget", "0.3", "--output", tuned) == 0
    out, err = capsys.readouterr()
    assert "all (stage 1 of the ranking)" in out
    assert "was made" not in err
    code = PLAIN_PEFT
    if objective == "reward":
        code = code.replace("CausalLM", "SequenceClassification").replace(
            "])", "], num_labels=1)", 1
        )
    assert set(fresh_process(code, tuned)) == best(folder, 6)
    record = record_of(tuned)
    base, selected, *_ = record["results"]
    assert (base["label"], selected["label"]) == ("base model", "selected")
    if objective != "reward":  # whose base has stage 1's head in a ranking, and a new one here
        assert base["held_out_loss_nats"] == pytest.approx(losses["base"], rel=1e-5)
    assert selected["held_out_loss_nats"] != base["held_out_loss_nats"]
    assert record["loss_unit"] == LOSS_UNITS[objective]


@pytest.mark.parametrize("objective", UNMOVED)
def test_an_adapter_and_a_checkpoint_are_compared_with_the_base_model(
    tiny, preferences, ranked, objective, tmp_path
):
    """Ranking stage 1's own adapter, or two checkpoints, has the base model as the reference."""
    folder, second, third = ranked[objective], tmp_path / "second", tmp_path / "third"
    assert rank(tiny, preferences, objective, second, "--adapter", folder / "adapter") == 0
    assert scores(second) == scores(folder)
    assert rank(tiny, preferences, objective, third, "--tuned", tiny / "tuned") == 0
    losses = made_by(third)["held_out_loss_nats"]
    assert abs(losses["tuned"] - UNMOVED[objective]) > 1e-3
    assert losses["base"] != losses["tuned"]


def test_a_full_update_trains_exactly_the_selection_against_the_base_model(ranked, tiny, tmp_path):
    options = ("--budget", "3", "--update", "full", "--output", tmp_path / "full")
    assert keylayers("train", "--ranking", ranked["dpo"], *options) == 0
    changed = changed_weights(tiny / "model", tmp_path / "full")
    assert changed == {f"{name}.weight" for name in best(ranked["dpo"], 3)}
    base, selected = (row["held_out_loss_nats"] for row in record_of(tmp_path / "full")["results"])
    assert base == pytest.approx(math.log(2), abs=1e-6)
    assert selected != base


@pytest.mark.parametrize("objective", ["dpo", "orpo"])  # TRL tokenises these in two ways
def test_a_field_of_some_turns_is_no_null_of_the_others_in_trls_trainer(tiny, objective, tmp_path):
    folder = shutil.copytree(tiny / "model", tmp_path / "model")
    thought = "{% if m.thinking is defined %}{{ m.thinking + '' }}{% endif %}"  # no null
    template = CHAT_TEMPLATE.replace("{{ m['content'] }}</s>", thought + "{{ m['content'] }}</s>")
    (folder / "chat_template.jinja").write_text(template)
    said = {"role": "assistant", "content": "Good."}
    answers = ([said], [said | {"thinking": "So so so."}])
    write_rows(
        tmp_path / "data.jsonl", [row | {"chosen": answers[i % 2]} for i, row in enumerate(PAIRS)]
    )
    options = ("--model", folder, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out")
    assert keylayers("rank", *options, "--objective", objective, "--max-steps", "1", *QUICK) == 0


def test_a_ranking_gives_its_beta_to_its_own_objective_and_is_noted_with_another(
    tiny, preferences, tmp_path, capsys
):
    assert rank(tiny, preferences, "dpo", tmp_path / "out", "--beta", "0.5", steps=1) == 0
    assert made_by(tmp_path / "out")["options"]["beta"] == 0.5
    options = ("--ranking", tmp_path / "out", "--budget", "2", "--steps", "1")
    for more, expected in (((), ("dpo", 0.5)), (("--objective", "reward"), ("reward", None))):
        output = tmp_path / expected[0]
        assert keylayers("train", *options, *more, "--output", output) == 0
        found = record_of(output)["options"]
        assert (found["objective"], found["beta"]) == expected
    out, err = capsys.readouterr()
    assert "the ranking was made for objective dpo, not for reward" in err
    assert out.count("stage 1 of the ranking") == 1


REFUSED = [
    ("--objective grpo", "call keylayers.rank_modules"),
    ("--objective sft --beta 0.1", "`beta` must be left out with `objective` sft"),
    ("--objective dpo --beta -1", "`beta` must be above 0"),
    ("--objective kto --batch-size 1", "`batch_size` must be at least 2"),
    ("--objective kto", "`objective` kto needs the columns label"),
    ("--objective reward --update full", "`update` must be an adapter with `objective` reward"),
    ("--objective sft", "choose an objective for preferences with `--objective`"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_mistakes_are_one_clear_line(tiny, preferences, tmp_path, options, message, capsys):
    base = ("--model", tiny / "model", "--data", preferences / "pairs.jsonl")
    assert keylayers("rank", *base, "--output", tmp_path / "o", *options.split()) == 2
    assert message in complaint(capsys)
    assert not (tmp_path / "o").exists()


def test_a_new_head_is_the_same_whatever_the_seed(tiny):
    def head(seed):
        torch.manual_seed(seed)
        return load_model(ModelOptions(model=str(tiny / "model")), "reward").score.weight

    assert torch.equal(head(1), head(2))
    assert bool(head(1).any())


def test_a_trainer_that_thaws_weights_is_refused(ranked, tmp_path, monkeypatch, capsys):
    from keylayers.training.run import OBJECTIVES

    trainer_class, *more = OBJECTIVES["dpo"]

    class Thawing(trainer_class):
        def __init__(self, model, **named):
            model.get_output_embeddings().weight.requires_grad_(True)
            super().__init__(model=model, **named)

    monkeypatch.setitem(OBJECTIVES, "dpo", (Thawing, *more))
    options = ("--budget", "2", "--output", tmp_path / "t")
    assert keylayers("train", "--ranking", ranked["dpo"], *options) == 1
    assert "exactly the selection, but 1 differ, first lm_head" in complaint(capsys)


DOCS = (Path(__file__).resolve().parents[1] / "docs" / "objectives.md").read_text()


def test_the_docs_name_every_objective_and_its_data():
    from keylayers.training.run import OBJECTIVES

    assert set(get_args(Objective)) == set(OBJECTIVES) == set(LOSS_UNITS) == {"sft", *FORMAT_OF}
    kinds = {"pairs": "pairs", "rated": "rated answers"}
    for objective, format in FORMAT_OF.items():
        [line] = [line for line in DOCS.splitlines() if line.startswith(f"| `{objective}` |")]
        assert f"| {kinds[format]} |" in line
