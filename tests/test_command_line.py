# SPDX-License-Identifier: Apache-2.0
"""A recorded run, written as a command and run again, is the same run."""

import shlex

import pytest

from commands import keylayers, rank, read
from keylayers.cli import app
from keylayers.commands.repeat import command_line
from tiny_files import NUM_BLOCKS

from rankings import ranking_of


def test_a_ranking_repeated_by_its_command_is_the_same(tiny, tmp_path):
    more = ("--granularity", "block", "--seed", "3", "--mask-data", "train", "--epsilon", "0")
    assert rank(tiny, tmp_path / "one", *more) == 0
    one = read(tmp_path / "one")
    assert len({module["score"] for module in one["modules"]}) == NUM_BLOCKS
    line = command_line("rank", one["provenance"]["options"])
    assert "--granularity block" in line
    assert "--max-length" not in line  # it is at its default
    program, *words = shlex.split(line)
    assert (program, words[0]) == ("keylayers", "rank")
    assert keylayers(*words, "--output", tmp_path / "two") == 0
    two = read(tmp_path / "two")
    assert two["provenance"]["options"] == one["provenance"]["options"]
    assert two["modules"] == one["modules"]


RANKED_WITH = {"lora_rank": 4, "batch_size": 4}
# Command, recorded options -> the line; trainings are on a ranking with the options above
LINES = [
    ("rank", {"model": "my model", "data": "d"}, "keylayers rank --model 'my model' --data d"),
    ("rank", {"model": "m; rm -rf ~"}, "keylayers rank --model 'm; rm -rf ~'"),
    ("rank", {"load_in_4bit": True, "data": "d"}, "keylayers rank --load-in-4bit --data d"),
    ("rank", {"trust_remote_code": False, "max_length": 1024}, "keylayers rank"),
    (
        "prune",
        {"ranking": "out", "freeze": 0.25, "dtype": "auto", "controls": []},
        "keylayers prune --ranking out --freeze 0.25 --dtype auto",
    ),
    ("train", {"ranking": "out", "steps": 300}, "keylayers train --ranking out --steps 300"),
    ("train", {"ranking": "r", "lora_rank": 16}, "keylayers train --ranking r --lora-rank 16"),
    ("train", {"ranking": "r", "lora_rank": 4}, "keylayers train --ranking r"),
    ("train", {"rank_first": True, "steps": 300}, "keylayers train --rank-first"),
]


@pytest.mark.parametrize(("command", "options", "line"), LINES)
def test_what_is_left_out_and_what_is_quoted(command, options, line):
    assert command_line(command, options, RANKED_WITH) == line


@pytest.mark.parametrize(("model", "revision"), [(None, "abc"), ("base", "abc"), ("other", None)])
def test_a_revision_is_taken_over_for_its_own_model_alone(tmp_path, model, revision):
    options = {"model": "base", "revision": "abc", "data": "d"}
    ranking_of([1.0], provenance={"options": options}).save(tmp_path / "ranking.json")
    words = ["train", "--ranking", str(tmp_path), "--budget", "1"]
    words += [] if model is None else ["--model", model]
    _, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    assert bound.arguments["options"].model.revision == revision
