# SPDX-License-Identifier: Apache-2.0
"""`keylayers verify` and `train --budget auto` on a tiny model, through the command line."""

import json
import shutil
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
    printed,
    rank,
    read,
    record_of,
    updated_modules,
    verified_in,
)
from keylayers.files import json_sha256
from keylayers.ranking.ranking import Ranking
from tiny_files import NUM_MODULES

FAST = ("--points", "5", "--random-orders", "2")
FASTEST = ("--points", "2", "--random-orders", "1")  # where only what is said matters
COUNTS = [0, 5, 10, 16, 21]  # five points over 21 modules
OTHER_SPLIT = "the data or their split differ from those of the ranking"
OTHER_UPDATE = "the update differs from the one that was ranked"
OTHER_WEIGHTS = "the ranking was made on other weights of the same shapes"


def verify(ranking, *more, fast=FAST, code=0):
    """What the command prints, on both streams."""
    found, *both = printed("verify", "--ranking", ranking, *fast, *more)
    assert found == code
    return both


def said(printed):
    """Which notes about other inputs than the ranking's own were given."""
    return {note for note in (OTHER_SPLIT, OTHER_UPDATE, OTHER_WEIGHTS) if note in printed[1]}


def update_of(folder):
    options = verified_in(folder)["provenance"]["options"]
    return {name: options[name] for name in ("adapter", "tuned") if options[name]}


def check_ends(folder):
    """The curves end at the held-out losses that the ranking recorded."""
    recorded = read(folder)["provenance"]["held_out_loss_nats"]
    found = verified_in(folder)
    for curve in (found["best_first"], found["worst_first"], *found["random"]):
        assert curve["counts"] == COUNTS
        assert curve["losses"][0] == pytest.approx(recorded["base"], rel=1e-4)
        assert curve["losses"][-1] == pytest.approx(recorded["tuned"], rel=1e-4)


@pytest.fixture(scope="module")
def run(ranked, tmp_path_factory):
    """A ranking that was verified with a margin that leaves modules out, and what was printed."""
    folder = tmp_path_factory.mktemp("verified") / "out"
    shutil.copytree(ranked, folder)
    return folder, verify(folder, "--margin", "0.5")


@pytest.fixture
def verified(run):
    return run[0]


@pytest.fixture
def own(verified, tmp_path):
    return Path(shutil.copytree(verified, tmp_path / "own"))


def test_the_rankings_own_inputs_give_four_curves_an_area_and_a_budget(tiny, run):
    folder, printed = run
    check_ends(folder)
    found, made_by = verified_in(folder), read(folder)["provenance"]
    curves = [found["best_first"], found["worst_first"], *found["random"]]
    assert len({tuple(curve["losses"]) for curve in curves}) == 4
    area, count = curves[0]["normalised_area"], found["recommendation"]["num_modules"]
    assert f"normalised area (0 is best): {area:.3f}" in printed[0]
    assert f"recommended budget: {count} of 21 modules" in printed[0]
    assert f"written to {folder / 'verification.json'}" in printed[0].replace("\n", "")
    assert said(printed) == set()
    taken = found["provenance"]
    assert taken["options"]["model"] == str(tiny / "model")
    assert taken["options"]["data"] == str(tiny / "data.jsonl")
    assert update_of(folder) == {"adapter": str(folder / "adapter")}
    assert taken["model"]["weights_sha256"] == made_by["model"]["weights_sha256"]
    assert taken["data"]["split_sha256"] == made_by["data"]["split_sha256"]
    assert taken["environment"]["libraries"]["peft"]


def test_only_the_verification_is_written_and_it_comes_out_the_same_elsewhere(
    ranked, verified, own, tmp_path
):
    before, after = (
        {path.relative_to(folder): content for path, content in everything_below(folder).items()}
        for folder in (ranked, verified)
    )
    written = Path("verification.json")
    assert after == before | {written: after[written]}
    left = listing(own)
    output = tmp_path / "new" / "curve"
    file = own / "ranking.json"  # instead of its folder
    verify(file, "--margin", "0.5", "--output", output)
    assert listing(own) == left
    assert {path.name for path in output.iterdir()} == {"ranking.json", "verification.json"}
    assert (output / "ranking.json").read_bytes() == file.read_bytes()
    content, other = verified_in(verified), verified_in(output)
    assert content["ranking_sha256"] == json_sha256(Ranking.load(verified).to_json())
    for part in ("best_first", "worst_first", "random", "recommendation", "ranking_sha256"):
        assert other[part] == content[part]
    options = ("--budget", "auto", "--to", "peft", "--output", tmp_path / "e")
    assert keylayers("export", output, *options) == 0


def test_the_points_are_measured_with_exactly_the_best_modules(tiny, verified):
    """Independently: PEFT's own model, with LoRA's B set to zero in the modules left out."""
    modules = {module["name"] for module in read(verified)["modules"]}
    kept = best(verified, COUNTS[1])
    worst = modules - best(verified, NUM_MODULES - COUNTS[1])
    for curve, names in (("best_first", kept), ("worst_first", worst)):
        loss = plain_loss(tiny, tiny / "model", verified / "adapter", modules - names)
        assert verified_in(verified)[curve]["losses"][1] == pytest.approx(loss, rel=1e-5)


@pytest.mark.long
def test_leave_one_out_adds_a_curve_and_its_area(ranking_copy):
    out, _ = verify(ranking_copy, "--leave-one-out")
    check_ends(ranking_copy)
    found = verified_in(ranking_copy)
    best_first, left_out = found["best_first"]["losses"], found["leave_one_out"]
    assert f"leave-one-out {left_out['normalised_area']:.3f}" in out
    assert left_out["counts"] == COUNTS
    assert (left_out["losses"][0], left_out["losses"][-1]) == (best_first[0], best_first[-1])


def test_an_update_or_a_mask_split_that_rank_was_given_is_taken_over(tiny, ranked_full, tmp_path):
    assert rank(tiny, tmp_path / "adapter", "--adapter", tiny / "adapter") == 0
    shutil.copytree(ranked_full, tmp_path / "tuned")
    for option in ("adapter", "tuned"):
        folder = tmp_path / option
        assert said(verify(folder)) == set()
        check_ends(folder)
        assert update_of(folder) == {option: str(tiny / option)}
    assert rank(tiny, tmp_path / "mask", "--mask-data", "held-out") == 0
    printed = verify(tmp_path / "mask")
    check_ends(tmp_path / "mask")
    assert "5 for the mask and 5 held out" in printed[1]
    assert said(printed) == set()


def test_an_adapter_of_another_split_of_the_same_data_is_said(
    tiny, ranked, trained, tmp_path, capsys
):
    for folder in (ranked / "adapter", trained):
        for more in ((), ("--held-out", "0.2"), ("--split-seed", "7")):
            assert rank(tiny, tmp_path / "again", "--adapter", folder, *more) == 0
            err = capsys.readouterr().err
            assert ("may have been trained on examples that are now" in err) == bool(more), err
    assert rank(tiny, tmp_path / "again", "--adapter", folder, "--max-examples", "40") == 0
    assert "may have been trained on" not in capsys.readouterr().err  # other examples


def test_other_inputs_than_the_rankings_own_win_and_are_said(tiny, ranking_copy, tmp_path):
    for option in ("adapter", "tuned"):
        printed = verify(ranking_copy, f"--{option}", tiny / option, fast=FASTEST)
        assert said(printed) == {OTHER_UPDATE}
        assert update_of(ranking_copy) == {option: str(tiny / option)}
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
    output = tmp_path / "t"
    options = ("--budget", "auto", "--steps", "2", "--output", output)
    assert keylayers("train", "--ranking", verified, *options) == 0
    count = verified_in(verified)["recommendation"]["num_modules"]
    assert 0 < count < NUM_MODULES
    record = record_of(output)
    assert record["options"]["budget"] == "auto"
    wanted = best(verified, count)
    assert set(record["selection"]["modules"]) == updated_modules(output) == wanted


def test_a_failed_verify_leaves_an_earlier_file_as_it_was(own):
    weights = own / "adapter" / "adapter_model.safetensors"
    nan = {name: value.fill_(float("nan")) for name, value in load_file(weights).items()}
    save_file(nan, weights)
    before = listing(own)
    line = complaint_in(verify(own, code=2)[1])
    assert "the loss must be finite, but it is nan at batch 1" in line
    assert listing(own) == before
