# SPDX-License-Identifier: Apache-2.0
"""A recorded run, written as a command and run again, is the same run."""

import json
import shlex

import pytest

from commands import STEPS, keylayers, rank, read

from rankings import ranking_of


def again(command, options, *more, ranked_with=None):
    from keylayers.commands.repeat import command_line

    line = command_line(command, options, ranked_with)
    words = shlex.split(line)
    assert words[:2] == ["keylayers", command]
    assert keylayers(*words[1:], *more) == 0
    return line


def test_a_ranking_repeated_by_its_command_is_the_same(tiny, tmp_path):
    more = ("--granularity", "block", "--seed", "3", "--mask-data", "train", "--epsilon", "0")
    assert rank(tiny, tmp_path / "one", *more) == 0
    one = read(tmp_path / "one")
    line = again("rank", one["provenance"]["options"], "--output", tmp_path / "two")
    two = read(tmp_path / "two")
    assert two["provenance"]["options"] == one["provenance"]["options"]
    assert two["modules"] == one["modules"]
    assert "--granularity block" in line
    assert "--max-length" not in line  # it is at its default


def test_a_training_repeated_by_its_command_is_the_same(ranked, tmp_path):
    """The ranking's run had LoRA rank 4; 16, the default, must then be written."""
    more = ("--lora-rank", "16", "--controls", "first", "last")
    arguments = ("--ranking", ranked, "--budget", "3", *STEPS, *more)
    assert keylayers("train", *arguments, "--output", tmp_path / "one") == 0
    one = json.loads((tmp_path / "one" / "keylayers.json").read_text())
    ranked_with = read(ranked)["provenance"]["options"]
    more = ("--output", tmp_path / "two")
    line = again("train", one["options"], *more, ranked_with=ranked_with)
    two = json.loads((tmp_path / "two" / "keylayers.json").read_text())
    assert "--lora-rank 16" in line
    assert "--batch-size" not in line  # it is that of the ranking
    assert "--controls first last" in line
    assert two["options"] == one["options"]
    assert two["losses"] == one["losses"]
    assert two["results"] == one["results"]


@pytest.mark.parametrize(
    ("command", "options", "line"),
    [
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
        ("train", {"rank_first": True, "steps": 300}, "keylayers train --rank-first"),
    ],
)
def test_what_is_left_out_and_what_is_quoted(command, options, line):
    from keylayers.commands.repeat import command_line

    assert command_line(command, options) == line


@pytest.mark.parametrize(("model", "revision"), [(None, "abc"), ("base", "abc"), ("other", None)])
def test_a_revision_is_taken_over_for_its_own_model_alone(tmp_path, model, revision):
    from keylayers.cli import app

    options = {"model": "base", "revision": "abc", "data": "d"}
    ranking_of([1.0], provenance={"options": options}).save(tmp_path / "ranking.json")
    words = ["train", "--ranking", str(tmp_path), "--budget", "1"]
    words += [] if model is None else ["--model", model]
    _, bound, _ = app.parse_args(words, print_error=False, exit_on_error=False)
    assert bound.arguments["options"].model.revision == revision
