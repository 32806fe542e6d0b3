# SPDX-License-Identifier: Apache-2.0
"""`keylayers verify` and `train --budget auto` on a tiny model, through the command line."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from commands import (
    best,
    complaint_in,
    everything_below,
    keylayers,
    listing,
    plain_loss,
    rank,
    read,
    record_of,
    updated_modules,
)
from tiny_files import NUM_MODULES

FAST = ("--points", "5", "--random-orders", "2")
FASTEST = ("--points", "2", "--random-orders", "1")  # where only what is said matters
COUNTS = [0, 5, 10, 16, 21]  # five points over 21 modules
OTHER_SPLIT = "the data or their split differ from those of the ranking"
OTHER_UPDATE = "the update differs from the one that was ranked"
OTHER_WEIGHTS = "the ranking was made on other weights of the same shapes"


@dataclass(frozen=True)
class Run:
    """A verified ranking or a training: its folder, and what was printed."""

    folder: Path
    code: int
    out: str
    err: str

    def content(self):
        return json.loads((self.folder / "verification.json").read_text(encoding="utf-8"))

    def losses(self):
        return self.content()["best_first"]["losses"]

    def complaint(self):
        assert (self.code, self.out) == (2, "")
        return complaint_in(self.err)


def run(folder, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = keylayers(*words)
    return Run(folder, code, out.getvalue(), err.getvalue())


def verify(folder, *more, fast=FAST):
    return run(folder, "verify", "--ranking", folder, *fast, *more)


def train_auto(folder, output):
    options = ("--ranking", folder, "--budget", "auto", "--steps", "2", "--output", output)
    return run(output, "train", *options)


def said(run):
    """Which notes about other inputs than the ranking's own were given."""
    assert run.code == 0
    return {note for note in (OTHER_SPLIT, OTHER_UPDATE, OTHER_WEIGHTS) if note in run.err}


def check_ends(run):
    """The curve ends at the held-out losses that the ranking recorded."""
    assert run.code == 0
    recorded = read(run.folder)["provenance"]["held_out_loss_nats"]
    content = run.content()
    for curve in (content["best_first"], content["worst_first"], *content["random"]):
        assert curve["losses"][0] == pytest.approx(recorded["base"], rel=1e-4)
        assert curve["losses"][-1] == pytest.approx(recorded["tuned"], rel=1e-4)


@pytest.fixture(scope="module")
def verified(ranked, tmp_path_factory):
    """A ranking that was verified with a margin that leaves modules out."""
    folder = tmp_path_factory.mktemp("verified") / "out"
    shutil.copytree(ranked, folder)
    return verify(folder, "--margin", "0.5")


@pytest.fixture
def own(verified, tmp_path):
    return Path(shutil.copytree(verified.folder, tmp_path / "own"))


def rows(text):
    """The rows of the curve table, as words without bars."""
    lines = text[: text.index("normalised area")].splitlines()
    split = [line.split() for line in lines if line.strip()[:1].isdigit()]
    return [[word for word in words if word[0].isdigit()] for words in split]


def test_the_curve_the_area_and_a_budget_are_shown(verified):
    content = verified.content()
    assert verified.code == 0
    table = rows(verified.out)
    assert [int(row[0]) for row in table] == COUNTS == content["best_first"]["counts"]
    # kept, best first, random and its spread, worst first
    assert [row[1] for row in table] == [f"{x:.4f}" for x in content["best_first"]["losses"]]
    assert [row[-1] for row in table] == [f"{x:.4f}" for x in content["worst_first"]["losses"]]
    assert {len(row) for row in table} == {5}
    area = content["best_first"]["normalised_area"]
    assert f"normalised area (0 is best): {area:.3f}" in verified.out
    count = content["recommendation"]["num_modules"]
    assert f"recommended budget: {count} of 21 modules" in verified.out
    assert f"written to {verified.folder / 'verification.json'}" in verified.out.replace("\n", "")
    assert max(len(line) for line in verified.out.splitlines() if "written" not in line) <= 120


def test_curves_of_four_orders_end_at_the_rankings_own_held_out_losses(verified):
    check_ends(verified)
    content = verified.content()
    assert content["best_first"]["losses"][-1] < content["best_first"]["losses"][0]
    curves = [content["best_first"], content["worst_first"], *content["random"]]
    assert len({tuple(curve["losses"]) for curve in curves}) == 4


def test_model_data_and_update_are_those_of_the_ranking(tiny, verified):
    taken = verified.content()["provenance"]
    made_by = read(verified.folder)["provenance"]
    assert taken["options"]["model"] == str(tiny / "model")
    assert taken["options"]["data"] == str(tiny / "data.jsonl")
    assert taken["options"]["adapter"] == str(verified.folder / "adapter")
    assert taken["options"]["tuned"] is None
    assert taken["model"]["weights_sha256"] == made_by["model"]["weights_sha256"]
    assert taken["data"]["split_sha256"] == made_by["data"]["split_sha256"]
    assert taken["environment"]["libraries"]["peft"]
    assert said(verified) == set()


def test_only_the_verification_is_written_and_it_comes_out_the_same_elsewhere(
    ranked, verified, own, tmp_path
):
    from keylayers.files import json_sha256
    from keylayers.ranking.ranking import Ranking

    files = {path.relative_to(verified.folder) for path in everything_below(verified.folder)}
    before = everything_below(ranked)
    assert files == {path.relative_to(ranked) for path in before} | {Path("verification.json")}
    assert all((verified.folder / p.relative_to(ranked)).read_bytes() == before[p] for p in before)
    left = listing(own)
    output = tmp_path / "new" / "curve"
    file = own / "ranking.json"  # instead of its folder
    assert verify(file, "--margin", "0.5", "--output", output).code == 0
    assert listing(own) == left
    assert {path.name for path in output.iterdir()} == {"ranking.json", "verification.json"}
    assert (output / "ranking.json").read_bytes() == file.read_bytes()
    content, other = verified.content(), Run(output, 0, "", "").content()
    assert content["ranking_sha256"] == json_sha256(Ranking.load(verified.folder).to_json())
    for part in ("best_first", "worst_first", "random", "recommendation", "ranking_sha256"):
        assert other[part] == content[part]
    assert train_auto(output, tmp_path / "tuned").code == 0


def test_the_points_are_measured_with_exactly_the_best_modules(tiny, verified):
    """Independently: PEFT's own model, with LoRA's B set to zero in the modules left out."""
    modules = {module["name"] for module in read(verified.folder)["modules"]}
    kept = best(verified.folder, COUNTS[1])
    worst = modules - best(verified.folder, NUM_MODULES - COUNTS[1])
    for curve, names in (("best_first", kept), ("worst_first", worst)):
        loss = plain_loss(tiny, tiny / "model", verified.folder / "adapter", modules - names)
        assert verified.content()[curve]["losses"][1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.long
def test_leave_one_out_adds_a_column_and_its_area(ranking_copy):
    run = verify(ranking_copy, "--leave-one-out")
    assert run.code == 0
    loo = run.content()["leave_one_out"]
    assert loo["counts"] == COUNTS
    table = rows(run.out)
    assert {len(row) for row in table} == {6}
    assert [row[-1] for row in table] == [f"{loss:.4f}" for loss in loo["losses"]]
    assert f"leave-one-out {loo['normalised_area']:.3f}" in run.out
    assert (loo["losses"][0], loo["losses"][-1]) == (run.losses()[0], run.losses()[-1])


def test_an_update_or_a_mask_split_that_rank_was_given_is_taken_over(tiny, tmp_path):
    for option, other in (("adapter", "tuned"), ("tuned", "adapter")):
        assert rank(tiny, tmp_path / option, f"--{option}", tiny / option) == 0
        run = verify(tmp_path / option)
        check_ends(run)
        options = run.content()["provenance"]["options"]
        assert (options[option], options[other]) == (str(tiny / option), None)
        assert [int(row[0]) for row in rows(run.out)] == COUNTS
    assert rank(tiny, tmp_path / "mask", "--mask-data", "held-out") == 0
    run = verify(tmp_path / "mask")
    check_ends(run)
    assert "5 for the mask and 5 held out" in run.err
    assert said(run) == set()


def test_other_inputs_than_the_rankings_own_win_and_are_said(tiny, ranking_copy, tmp_path):
    for option, other in (("adapter", "tuned"), ("tuned", "adapter")):
        run = verify(ranking_copy, f"--{option}", tiny / option, fast=FASTEST)
        options = run.content()["provenance"]["options"]
        assert (options[option], options[other]) == (str(tiny / option), None)
        assert said(run) == {OTHER_UPDATE}
    lines = (tiny / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:40]))
    for more in (("--data", tmp_path / "other.jsonl"), ("--split-seed", "7")):
        assert said(verify(ranking_copy, *more, fast=FASTEST)) == {OTHER_SPLIT}
    # As after a second `rank` that ended in stage 2: its adapter lies beside the old ranking.
    weights = ranking_copy / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    changed = read(ranking_copy)
    changed["provenance"]["model"]["weights_sha256"] = "0" * 64
    (ranking_copy / "ranking.json").write_text(json.dumps(changed))
    assert said(verify(ranking_copy, fast=FASTEST)) == {OTHER_WEIGHTS, OTHER_UPDATE}


def test_the_automatic_budget_trains_exactly_the_recommended_modules(verified, tmp_path):
    run = train_auto(verified.folder, tmp_path / "t")
    assert run.code == 0
    count = verified.content()["recommendation"]["num_modules"]
    assert 0 < count < NUM_MODULES
    wanted, record = best(verified.folder, count), record_of(tmp_path / "t")
    assert set(record["selection"]["modules"]) == wanted
    assert record["selection"]["num_modules"] == count
    assert record["options"]["budget"] == "auto"
    assert updated_modules(tmp_path / "t") == wanted


def test_the_automatic_budget_needs_the_ranking_that_was_verified(own, tmp_path):
    content = read(own)
    content["modules"][3]["score"] += 1.0
    (own / "ranking.json").write_text(json.dumps(content))
    line = train_auto(own, tmp_path / "t").complaint()
    assert "the ranking changed since; run `keylayers verify` again" in line
    assert not (tmp_path / "t").exists()
    assert verify(own, "--margin", "0.5").code == 0
    assert train_auto(own, tmp_path / "t").code == 0


def test_the_automatic_budget_needs_a_fine_tune_that_helps(ranked_full, tmp_path):
    shutil.copytree(ranked_full, tmp_path / "out")  # weights plus noise
    run = verify(tmp_path / "out")
    assert said(run) == set()
    assert run.losses()[-1] > run.losses()[0]
    assert "normalised area: undefined" in run.out
    line = train_auto(tmp_path / "out", tmp_path / "t").complaint()
    assert "`budget` auto needs a fine-tune that lowers the held-out loss" in line
    assert not (tmp_path / "t").exists()


def test_a_failed_verify_leaves_an_earlier_file_as_it_was(own):
    weights = own / "adapter" / "adapter_model.safetensors"
    nan = {name: value.fill_(float("nan")) for name, value in load_file(weights).items()}
    save_file(nan, weights)
    before = listing(own)
    assert "the loss must be finite, but it is nan at batch 1" in verify(own).complaint()
    assert listing(own) == before
    shutil.rmtree(own / "adapter")
    before = listing(own)
    verify(own).complaint()
    assert listing(own) == before
