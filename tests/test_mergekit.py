# SPDX-License-Identifier: Apache-2.0
"""Exports to mergekit: it keeps the fine-tune in exactly the selected modules, as `prune` does.

The long tests run mergekit itself. `MERGEKIT` names the Python of an environment that has it
(`.ci/run` makes one); without it they are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from architectures import ARCHITECTURES
from commands import complaint, keylayers, rank, weights_in
from keylayers import export_selection
from keylayers.apply.trainable import train_only
from keylayers.errors import ConfigError
from keylayers.model.modules import map_modules
from keylayers.model.options import UpdateOptions
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from rankings import run_of

MERGEKIT = os.environ.get("MERGEKIT")
with_mergekit = [
    pytest.mark.long,
    pytest.mark.skipif(
        not MERGEKIT, reason="set MERGEKIT to the Python of an environment with mergekit 0.1.5"
    ),
]
ADDING = ("task_arithmetic", "ties", "dare_ties", "dare_linear", "della")


def exported(ranking, folder, budget="0.3"):
    assert keylayers("export", ranking, "--to", "mergekit", "--budget", budget, "--output", folder) == 0
    return yaml.safe_load((folder / "mergekit.yaml").read_text())


def test_the_models_are_those_that_were_ranked(tiny, ranked, ranked_full, tmp_path):
    model = str(tiny / "model")
    for ranking, tuned in (
        (ranked_full, str(tiny / "tuned")),
        (ranked / "ranking.json", f"{model}+{ranked / 'adapter'}"),  # of its stage 1
    ):
        found = exported(ranking, tmp_path / ranking.name)
        assert found["base_model"] == model
        assert [entry["model"] for entry in found["models"]] == [model, tuned]


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {}, "needs the update that was ranked.*names none that is there"),
        ({"tuned": "a+b"}, {}, r"reads \+ and @ in 'a\+b' as separators"),
        ({}, {"adapter": "me@home"}, r"reads \+ and @ in 'me@home'"),
        ({"tuned": "t"}, {"kind": "full"}, "nothing is trained: leave `update` out"),
    ],
)
def test_what_is_no_merge_is_refused(tmp_path, options, given, message):
    if "adapter" in given:
        given = {"update": UpdateOptions(**given)}
    with pytest.raises(ConfigError, match=message):
        export_selection(run_of(options=options), 2, "mergekit", tmp_path / "e", **given)
    assert not (tmp_path / "e").exists()


def test_parts_are_refused(ranked_parts, tmp_path, capsys):
    words = ("--to", "mergekit", "--budget", "0.3", "--output", tmp_path / "e")
    assert keylayers("export", ranked_parts, *words) == 2
    assert "`to` mergekit must express exactly the selection" in complaint(capsys)


def test_a_name_that_contains_another_is_refused_and_a_revision_is_named(tmp_path):
    names = ("layers.1.a", "layers.11.a", "tower.layers.1.a", "tower.layers.1.ab")
    scores = (4.0, 3.0, 2.0, 1.0)
    modules = tuple(
        RankedModule(name, 1, "a", 10, score) for name, score in zip(names, scores, strict=True)
    )
    made_by = {"model": {"name": "m"}, "options": {"tuned": "t", "revision": "v1"}}
    ranking = Ranking(modules, "by hand", provenance=made_by)
    for count in (1, 2):
        with pytest.raises(ConfigError, match=r"'layers.1.a.' would match tower.layers.1.a too"):
            export_selection(ranking, count, "mergekit", tmp_path / "e")
    export_selection(ranking, 3, "mergekit", tmp_path / "e")
    found = yaml.safe_load((tmp_path / "e" / "mergekit.yaml").read_text())
    assert [found["base_model"], found["models"][0]["model"]] == ["m@v1", "m@v1"]


def in_mergekit(*arguments, **options):
    command = [MERGEKIT, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def merged(tmp_path):
    """The tensors of a merge by mergekit, with a config that `keylayers export` wrote."""

    def run(config, method):
        file, folder = tmp_path / f"{method}.yaml", tmp_path / method
        file.write_text(yaml.safe_dump(config | {"merge_method": method}))
        where = ("--lora-merge-cache", tmp_path / "loras")
        in_mergekit("-m", "mergekit.scripts.run_yaml", file, folder, *where)
        return weights_in(folder)

    return run


def differing(one, other):
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


for_long = pytest.mark.usefixtures()  # placeholder for readability of the table below
