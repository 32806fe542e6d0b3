# SPDX-License-Identifier: Apache-2.0
"""README.md of what keylayers trains or prunes: the hub's form, the record's numbers."""

import re
import shlex
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM

from commands import keylayers, record_of, weights_in
from keylayers.commands.repeat import card_of as made_card
from tiny_files import NUM_MODULES

from rankings import ranking_of


def card_of(folder):
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def table(card, heading):
    """Rows of the first table below a heading, without its titles."""
    part = card.text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def bold(card):
    return sorted(
        int(rank) for row in table(card, "Modules") for rank in re.findall(r"\*\*(\d+)", str(row))
    )


def commands(card):
    return card.text.split("```sh\n")[1].split("\n```")[0].splitlines()


def test_a_trained_adapter_says_how_it_was_made_and_how_good_it_is(ranked, trained):
    card, record = card_of(trained), record_of(trained)
    assert card.data.base_model is None  # a folder of this machine is no name on the hub
    assert bold(card) == [1, 2, 3]
    losses = {row[0]: row[1:] for row in table(card, "Losses")}
    for row in record["results"]:
        size, loss = f"{row['num_trained_parameters']:,}", f"{row['held_out_loss_nats']:.4f}"
        assert losses[row["label"]] == [str(row["num_modules"]), size, loss]
    assert "random" in losses  # the control, trained after the adapter was written
    assert record["ranking_sha256"] in card.text
    assert "More Information Needed" not in card.text
    made, used = commands(card)
    assert made.startswith("keylayers rank --model ")
    assert used.startswith(f"keylayers train --ranking {ranked} --budget 3 --steps 8 ")


def test_the_commands_of_a_card_make_the_same_adapter_again(trained, tmp_path):
    command = commands(card_of(trained))[1]
    assert "--controls random" in command
    assert "--batch-size" not in command  # it is that of the ranking
    again = tmp_path / "again"
    assert keylayers(*shlex.split(command)[1:], "--output", again) == 0
    weights = "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (trained / weights).read_bytes()
    assert card_of(again).text == card_of(trained).text
    one, two = record_of(trained), record_of(again)
    for part in ("options", "losses", "results"):
        assert two[part] == one[part]


def test_stage_1_says_that_all_modules_were_tuned(ranked):
    card = card_of(ranked / "adapter")
    assert "stage 1 of a ranking by keylayers: all modules were tuned" in card.text
    (command,) = commands(card)
    assert command.startswith("keylayers rank --model ")
    assert "## Modules" not in card.text


def test_a_pruned_adapter_shows_what_it_loses(pruned):
    card, found = card_of(pruned), record_of(pruned)["result"]
    assert bold(card) == [1, 2, 3, 4, 5]
    rows = [("base model", 0, 0, found["base_loss_nats"])]
    rows += [
        (label, number, found[key]["num_parameters"], found[f"{key}_loss_nats"])
        for label, number, key in (("all modules", 21, "full"), ("this one", 5, "pruned"))
    ]
    assert table(card, "Losses") == [
        [label, str(number), f"{size:,}", f"{loss:.4f}"] for label, number, size, loss in rows
    ]
    assert "was pruned to 5 of 21 weight matrices" in card.text


def test_an_adapter_of_parts_shows_the_rank_of_each_module(ranked_parts, tmp_path):
    wanted = ("--ranking", ranked_parts, "--budget", "0.2x-params", "--output", tmp_path / "cut")
    assert keylayers("prune", *wanted) == 0
    shown = sorted(
        int(cell) for row in table(card_of(tmp_path / "cut"), "Modules") for cell in row[1:]
    )
    found = weights_in(tmp_path / "cut").items()
    ranks = [len(weight) for name, weight in found if ".lora_A." in name]
    assert shown == sorted([0] * (NUM_MODULES - len(ranks)) + ranks)


def test_ranking_inside_the_run_is_one_command(tiny, tmp_path):
    paths = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    more = ("--steps", "8", "--mask-batches", "2", "--lora-rank", "4")
    assert keylayers("train", "--rank-first", *paths, *more) == 0
    card = card_of(tmp_path / "out")
    (command,) = commands(card)
    assert command.startswith("keylayers train --rank-first ")
    kept = record_of(tmp_path / "out")["selection"]["num_modules"]
    assert bold(card) == list(range(1, kept + 1))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_peft_loads_and_saves_the_adapter_with_its_own_card(trained, tmp_path):
    """What `push_to_hub` of PEFT does before it uploads."""
    model = AutoPeftModelForCausalLM.from_pretrained(trained)
    model.save_pretrained(tmp_path / "again")
    assert card_of(tmp_path / "again").data.library_name == "peft"


RECORD = {
    "environment": {"keylayers": "1", "commit": None, "libraries": {"peft": "2"}},
    "model": {"name": "org/base", "weights_sha256": "0"},
    "data": {"data": "org/data:part", "num_train": 4, "num_held_out": 2, "split_sha256": "1"},
    "options": {"model": "org/base", "data": "org/data:part", "ranking": "r.json", "budget": "1"},
    "ranking_sha256": "2",
}


def written(ranking, record):
    record = record | {"selection": ranking.select(1).record()}
    return ModelCard(made_card("train", record, ranking))


# options, library, its class to load with
KINDS = [
    ({}, "peft", "AutoPeftModelForCausalLM"),
    ({"objective": "reward"}, "peft", "AutoPeftModelForSequenceClassification"),
    ({"update": "full"}, "transformers", "AutoModelForCausalLM"),
    ({"tuned": "org/tuned"}, "transformers", "AutoModelForCausalLM"),
]


@pytest.mark.parametrize(("options", "library", "loader"), KINDS)
def test_metadata_name_what_is_on_the_hub_and_the_library(options, library, loader):
    record = RECORD | {"options": RECORD["options"] | options}
    card = written(ranking_of([1.0, 0.5]), record)
    assert (card.data.base_model, card.data.datasets) == ("org/base", ["org/data"])
    assert card.data.library_name == library
    update = "full" if library == "transformers" else "lora"
    assert card.data.tags == ["keylayers", update, options.get("objective", "sft")]
    task = "text-classification" if "objective" in options else "text-generation"
    assert card.data.pipeline_tag == task
    assert f"from {library} import {loader}" in card.text


def test_foreign_names_are_text():
    bad = "<script>alert(1)</script>|[x](javascript:1)`***\n## x"
    ranking = ranking_of([1.0, 0.5], provenance={"options": {"model": "```\nrm", "data": "d"}})
    modules = tuple(
        replace(one, projection=f"{bad}{index}") for index, one in enumerate(ranking.modules)
    )
    record = RECORD | {"model": {"name": bad, "weights_sha256": "0"}}
    card = written(replace(ranking, modules=modules, method=bad), record)
    assert "<script>" not in card.text
    assert "[x](javascript" not in card.text
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Modules", "## How it was made", "## Use"]
    assert "\n````sh\n" in card.text  # a longer fence than what is in it
