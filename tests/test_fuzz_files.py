# SPDX-License-Identifier: Apache-2.0
"""Generated damage to the files that commands read: one line and exit code 2, or a right result."""

import json
import math
import shutil
from dataclasses import replace

import pytest
from hypothesis import given

from damage import LARGE, begin, cases, damaged_json, run

from rankings import ranking_of

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings(LARGE)]
SCORES = [0.9, 0.5, None, 0.45, 0.5, 0.1]
MADE_BY = {
    "environment": {"keylayers": "0.1.0", "commit": None, "libraries": {"torch": "2"}},
    "model": {"name": "org/base", "weights_sha256": "0"},
    "data": {"data": "d.jsonl", "content_sha256": "1", "split_sha256": "2", "num_train": 3},
    "options": {"model": "org/base", "data": "d.jsonl", "seed": 0, "lora_rank": 8},
    "stage_1": {"num_steps": 2, "stopped_by": "stable", "seconds": 1.5, "losses": [3.0, 2.0]},
    "mask": {"losses": [2.0, 1.0], "seconds": 1.0, "score_unit": "nats per token"},
    "held_out_loss_nats": {"base": 3.0, "tuned": 2.0},
    "adalora_ranks_left": {"model.layers.0.a_proj": 3},
}


def by_hand():
    ranking = ranking_of(SCORES, num_parameters=[10, 20, 30, 40, 50, 60], provenance=MADE_BY)
    errors = [None if module.score is None else 0.04 for module in ranking.modules]
    modules = zip(ranking.modules, errors, strict=True)
    modules = tuple(replace(module, standard_error=error) for module, error in modules)
    return replace(ranking, modules=modules)


def check_ranking(path):
    """What was accepted is a ranking: finite scores, in order, the same after a round trip."""
    from keylayers.ranking.ranking import Ranking

    ranking = Ranking.load(path)
    scores = [module.score for module in ranking.ordered()]
    known = [score for score in scores if score is not None]
    assert all(math.isfinite(score) for score in known)
    assert known == sorted(known, reverse=True)
    assert scores[len(known) :] == [None] * (len(scores) - len(known))
    assert Ranking.from_json(json.loads(json.dumps(ranking.to_json())), "again") == ranking


RANKING = [
    ("show", "{file}"),
    ("show", "{file}", "--json"),
    ("show", "{file}", "--budget", "0.5x-params"),
    ("compare", "{file}", "{good}", "--budget", "2"),
    ("compare", "{good}", "{file}", "--json", "--consensus", "{folder}/consensus.json"),
    ("export", "{file}", "--budget", "2", "--to", "peft", "--output", "{folder}/out"),
    ("export", "{file}", "--budget", "0.6x-time", "--to", "axolotl", "--output", "{folder}/out"),
    ("show", "{file}", "--figure", "{folder}/heatmap.svg", "{folder}/losses.svg"),
    ("show", "{file}", "{good}", "--html", "{folder}/report.html"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def filled(command, folder, path):
    names = {"file": path, "good": folder / "good.json", "folder": folder}
    return [word.format(**names) for word in command]


def clean(folder):
    shutil.rmtree(folder / "out", ignore_errors=True)
    for name in ("consensus.json", "heatmap.svg", "losses.svg", "report.html", "curve.svg"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize("command", RANKING, ids=" ".join)
def test_a_damaged_ranking_is_refused_or_right(command, folder):
    by_hand().save(folder / "good.json")
    path = folder / "ranking.json"
    begin(*filled(command, folder, folder / "good.json"))

    @cases(1000)
    @given(damaged_json(by_hand().to_json()))
    def check(content):
        clean(folder)
        path.write_bytes(content)
        if run(*filled(command, folder, path)) == 0:
            check_ranking(path)

    check()


def verification_of(ranking):
    from keylayers.files import json_sha256
    from keylayers.ranking.curve import MaskCurve
    from keylayers.ranking.verification import Verification

    def curve(*losses):
        rows = tuple((loss, loss + 0.1) for loss in losses)
        counts = tuple(range(len(losses)))
        return MaskCurve(counts=counts, losses=losses, batch_losses=rows, batch_weights=(1.0, 1.0))

    return Verification(
        ranking_sha256=json_sha256(ranking.to_json()),
        best_first=curve(3.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.0),
        worst_first=curve(3.0, 2.9, 2.8, 2.5, 2.0, 1.5, 1.0),
        random=(curve(3.0, 2.5, 2.0, 1.8, 1.5, 1.2, 1.0),),
        leave_one_out=curve(3.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.0),
        provenance=MADE_BY,
    )


@pytest.mark.parametrize(
    "command",
    [
        ("export", "{good}", "--budget", "auto", "--to", "trl", "--output", "{folder}/out"),
        ("show", "{good}", "--figure", "{folder}/curve.svg"),
    ],
    ids=" ".join,
)
def test_a_damaged_verification_is_refused_or_right(command, folder):
    by_hand().save(folder / "good.json")
    path = folder / "good.verification.json"
    verification_of(by_hand()).save(path)
    content = json.loads(path.read_text())
    begin(*filled(command, folder, path))

    @cases(1000)
    @given(damaged_json(content))
    def check(content):
        clean(folder)
        path.write_bytes(content)
        run(*filled(command, folder, path))

    check()
    path.unlink()


def test_links_in_a_circle_are_refused(folder):
    for name, target in (("a.json", "b.json"), ("b.json", "a.json"), ("dir", "dir")):
        (folder / name).symlink_to(folder / target)
    for path in (folder / "a.json", folder / "dir"):
        assert run("show", path) == 2
        assert run("show", path, "--html", folder / "r.html") == 2
        assert run("export", path, "--budget", "1", "--to", "peft") == 2
