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
from peft import PeftModel
from transformers import AutoModelForCausalLM

from architectures import ARCHITECTURES
from commands import complaint, keylayers, rank, weights_in
from keylayers import export_selection
from keylayers.apply.trainable import train_only
from keylayers.errors import ConfigError
from keylayers.model.modules import map_modules
from keylayers.model.options import UpdateOptions
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from merges import weight_by_rule

from rankings import run_of

MERGEKIT = os.environ.get("MERGEKIT")
long = pytest.mark.long
with_mergekit = pytest.mark.skipif(
    not MERGEKIT, reason="set MERGEKIT to the Python of an environment with mergekit 0.1.5"
)
ADDING = ("task_arithmetic", "ties", "dare_ties", "dare_linear", "della")


def exported(ranking, folder):
    words = ("--to", "mergekit", "--budget", "0.3", "--output", folder)
    assert keylayers("export", ranking, *words) == 0
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


def in_mergekit(jobs):
    command = [MERGEKIT, "-W", "ignore", Path(__file__).with_name("merges.py")]
    given = json.dumps(jobs)
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def merged(config, folder, *methods):
    """The tensors of merges by mergekit, with a config that `keylayers export` wrote."""
    folders = [folder / method for method in methods]
    pairs = zip(methods, folders, strict=True)
    in_mergekit(
        [{"config": config | {"merge_method": one}, "output": str(path)} for one, path in pairs]
    )
    return [weights_in(path) for path in folders]


def differing(one, other):
    assert one.keys() == other.keys()
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@pytest.fixture(scope="module")
def full(tiny, once):
    """A ranking of a full fine-tune, which changed nothing but the ranked modules."""
    return once("full_for_merges", lambda folder: rank(tiny, folder, "--update", "full"))


@long
@with_mergekit
def test_a_merge_has_the_weights_that_prune_writes(tiny, full, tmp_path):
    """Bit for bit by `linear`; the other methods add a difference, which rounds."""
    linear, *adding = merged(exported(full, tmp_path / "e"), tmp_path, "linear", *ADDING)
    expected = weights_in(cut(full, tmp_path / "p"))
    assert differing(linear, expected) == set()
    base, tuned = weights_in(tiny / "model"), weights_in(full / "tuned")
    for name in differing(expected, base):
        expected[name] = base[name] + (tuned[name] - base[name])
    assert [differing(found, expected) for found in adding] == [set()] * len(ADDING)


@long
@with_mergekit
def test_what_is_not_ranked_has_the_weights_of_the_base(tiny, ranked_full, tmp_path):
    """The norms of this tuned checkpoint differ too; `prune` keeps those."""
    (found,) = merged(exported(ranked_full, tmp_path / "e"), tmp_path, "linear")
    base, pruned = weights_in(tiny / "model"), weights_in(cut(ranked_full, tmp_path / "p"))
    norms = {name for name in base if "norm" in name}
    assert differing(found, pruned) == norms
    assert differing(found, base) == differing(pruned, base) - norms


@long
@with_mergekit
def test_an_adapter_is_merged_as_peft_merges_the_pruned_one(tiny, ranked, tmp_path):
    (found,) = merged(exported(ranked, tmp_path / "e"), tmp_path, "linear")
    dtype = next(iter(found.values())).dtype
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=dtype)
    model = PeftModel.from_pretrained(model, cut(ranked, tmp_path / "p")).merge_and_unload()
    assert differing(found, {name: model.state_dict()[name] for name in found}) == set()


def cut(ranking, folder):
    words = ("--ranking", ranking, "--budget", "0.3", "--output", folder)
    assert keylayers("prune", *words) == 0
    return folder


DENSE = [one for one in ARCHITECTURES if one.title not in ("Mixtral", "Qwen3-MoE", "DeepSeek-V3")]


@long
@with_mergekit
def test_every_filter_matches_its_own_module_by_the_names_and_rule_of_mergekit(tmp_path):
    jobs, all_names, selected = [], [], []
    for place, architecture in enumerate(DENSE):
        model, folder = architecture.build(), tmp_path / str(place)
        model.save_pretrained(folder)
        modules = map_modules(model, architecture.towers)
        ranked = tuple(RankedModule.of(one, float(i % 7)) for i, one in enumerate(modules))
        made_by = {"model": {"name": str(folder)}, "options": {"tuned": str(folder)}}
        ranking = Ranking(ranked, "by hand", provenance=made_by)
        export_selection(ranking, 0.4, "mergekit", folder / "e")
        config = yaml.safe_load((folder / "e" / "mergekit.yaml").read_text())
        jobs.append({"config": config, "model": str(folder)})
        train_only(model, ranking.select(0.4).names)
        all_names.append({name for name, _ in model.named_parameters()})
        selected.append({name for name, one in model.named_parameters() if one.requires_grad})
    for job, found, own, kept in zip(jobs, in_mergekit(jobs), all_names, selected, strict=True):
        entries = [entry["parameters"]["weight"] for entry in job["config"]["models"]]
        assert found == {name: [weight_by_rule(one, name) for one in entries] for name in found}
        assert all(sorted(weights) == [0, 1] for weights in found.values())
        # mergekit also lists biases that a model need not have
        assert {name for name, weights in found.items() if weights == [0, 1]} & own == kept
