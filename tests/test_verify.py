# SPDX-License-Identifier: Apache-2.0
"""`keylayers verify` and `train --budget auto` on a tiny model, through the command line."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import best, keylayers, listing, plain_loss, rank, record_of, updated_modules
from tiny_files import NUM_MODULES

FAST = ("--points", "5", "--random-orders", "2")
FASTEST = ("--points", "2", "--random-orders", "1")  # where only what is said matters
COUNTS = [0, 5, 10, 16, 21]  # five points over 21 modules
OTHER_SPLIT = "the data or their split differ from those of the ranking"


@dataclass(frozen=True)
class Run:
    """A ranking that was verified: the folder, the file's content, and what was printed."""

    folder: Path
    code: int
    out: str
    err: str

    def content(self):
        return json.loads((self.folder / "verification.json").read_text(encoding="utf-8"))

    def made_by(self):
        return json.loads((self.folder / "ranking.json").read_text(encoding="utf-8"))["provenance"]


def verify(folder, *more, fast=FAST):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = keylayers("verify", "--ranking", folder, *fast, *more)
    return Run(folder, code, out.getvalue(), err.getvalue())


def complaint(run):
    """The last line on stderr, which is the only one that says what is wrong."""
    assert (run.code, run.out) == (2, "")
    assert "Traceback" not in run.err
    errors = [line for line in run.err.splitlines() if line.startswith("keylayers: ")]
    assert errors == run.err.splitlines()[-1:]
    return errors[0]


@pytest.fixture(scope="module")
def verified(ranked, tmp_path_factory):
    """The same, verified with a margin that leaves modules out."""
    folder = tmp_path_factory.mktemp("verified") / "out"
    shutil.copytree(ranked, folder)
    return verify(folder, "--margin", "0.5")


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
    assert f"normalised area (0 is best): {content['best_first']['normalised_area']:.3f}" in (
        verified.out
    )
    count = content["recommendation"]["num_modules"]
    assert f"recommended budget: {count} of 21 modules" in verified.out
    assert f"written to {verified.folder / 'verification.json'}" in verified.out.replace("\n", "")
    assert max(len(line) for line in verified.out.splitlines() if "written" not in line) <= 120


def test_a_verification_elsewhere_is_the_same_with_a_copy_of_the_ranking(
    ranking_copy, tmp_path, verified
):
    before = sorted(path.name for path in ranking_copy.iterdir())
    found = verify(ranking_copy, "--margin", "0.5", "--output", tmp_path / "new" / "curve")
    assert found.code == 0
    assert sorted(path.name for path in ranking_copy.iterdir()) == before
    folder = tmp_path / "new" / "curve"
    assert sorted(path.name for path in folder.iterdir()) == ["ranking.json", "verification.json"]
    assert (folder / "ranking.json").read_bytes() == (ranking_copy / "ranking.json").read_bytes()
    content = json.loads((folder / "verification.json").read_text(encoding="utf-8"))
    assert content["best_first"] == verified.content()["best_first"]
    trained = ("--steps", "1", "--output", tmp_path / "tuned")
    assert keylayers("train", "--ranking", folder, "--budget", "auto", *trained) == 0


def test_the_curve_ends_at_the_rankings_own_held_out_losses(verified):
    losses = verified.made_by()["held_out_loss_nats"]
    content = verified.content()
    assert losses["tuned"] < losses["base"]
    curves = [content["best_first"], content["worst_first"], *content["random"]]
    assert len(curves) == 4
    for curve in curves:
        assert curve["losses"][0] == pytest.approx(losses["base"], rel=1e-4)
        assert curve["losses"][-1] == pytest.approx(losses["tuned"], rel=1e-4)
    assert len({tuple(curve["losses"]) for curve in curves}) == 4  # four orders


def test_model_data_and_update_are_those_of_the_ranking(tiny, verified):
    taken = verified.content()["provenance"]
    made_by = verified.made_by()
    assert taken["options"]["model"] == str(tiny / "model")
    assert taken["options"]["data"] == str(tiny / "data.jsonl")
    assert taken["options"]["adapter"] == str(verified.folder / "adapter")
    assert taken["options"]["tuned"] is None
    assert taken["model"]["weights_sha256"] == made_by["model"]["weights_sha256"]
    assert taken["data"]["split_sha256"] == made_by["data"]["split_sha256"]
    assert taken["environment"]["libraries"]["peft"]
    assert "the ranking was made on" not in verified.err
    assert OTHER_SPLIT not in verified.err


def test_only_the_verification_is_written(ranked, verified):
    def files(folder):
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    after = files(verified.folder)
    assert after.pop("verification.json")
    assert after == files(ranked)


def test_it_belongs_to_the_ranking_and_comes_out_the_same_again(verified, ranking_copy):
    from keylayers.files import json_sha256
    from keylayers.ranking.ranking import Ranking

    content = verified.content()
    sha256 = json_sha256(Ranking.load(verified.folder).to_json())
    assert content["ranking_sha256"] == sha256
    again = verify(
        ranking_copy / "ranking.json", "--margin", "0.5"
    )  # the file instead of its folder
    assert again.code == 0
    other = json.loads((ranking_copy / "verification.json").read_text())
    for part in ("best_first", "worst_first", "random", "recommendation", "ranking_sha256"):
        assert other[part] == content[part]


def test_the_points_are_measured_with_exactly_the_best_modules(tiny, verified):
    """Independently: PEFT's own model, with LoRA's B set to zero in the modules left out."""
    modules = json.loads((verified.folder / "ranking.json").read_text())["modules"]
    content = verified.content()
    for curve, is_kept in (
        ("best_first", lambda place: place <= COUNTS[1]),
        ("worst_first", lambda place: place > NUM_MODULES - COUNTS[1]),
    ):
        left_out = {module["name"] for module in modules if not is_kept(module["rank"])}
        assert len(left_out) == NUM_MODULES - COUNTS[1]
        loss = plain_loss(tiny, tiny / "model", verified.folder / "adapter", left_out)
        assert content[curve]["losses"][1] == pytest.approx(loss, rel=1e-5)


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
    assert (loo["losses"][0], loo["losses"][-1]) == (
        run.content()["best_first"]["losses"][0],
        run.content()["best_first"]["losses"][-1],
    )


@pytest.mark.parametrize(
    "way", [("adapter", "adapter"), ("tuned", "tuned")], ids=["an adapter", "a checkpoint"]
)
def test_an_update_that_was_given_to_rank_is_taken_over(tiny, tmp_path, way):
    option, name = way
    assert rank(tiny, tmp_path / "out", f"--{option}", tiny / name) == 0
    run = verify(tmp_path / "out")
    assert run.code == 0
    options = run.content()["provenance"]["options"]
    assert options[option] == str(tiny / name)
    assert options["adapter" if option == "tuned" else "tuned"] is None
    losses = run.made_by()["held_out_loss_nats"]
    measured = run.content()["best_first"]["losses"]
    assert measured[0] == pytest.approx(losses["base"], rel=1e-4)
    assert measured[-1] == pytest.approx(losses["tuned"], rel=1e-4)
    assert [int(row[0]) for row in rows(run.out)] == COUNTS


def test_an_update_that_is_given_wins_over_that_of_the_ranking(tiny, ranking_copy):
    for option in ("adapter", "tuned"):
        run = verify(ranking_copy, f"--{option}", tiny / option, fast=FASTEST)
        assert run.code == 0
        options = run.content()["provenance"]["options"]
        other = "adapter" if option == "tuned" else "tuned"
        assert (options[option], options[other]) == (str(tiny / option), None)


def test_a_mask_split_is_left_out_of_the_held_out_examples_again(tiny, tmp_path):
    assert rank(tiny, tmp_path / "out", "--mask-data", "held-out") == 0
    run = verify(tmp_path / "out")
    assert run.code == 0
    assert "5 for the mask and 5 held out" in run.err
    assert OTHER_SPLIT not in run.err
    losses = run.made_by()["held_out_loss_nats"]
    assert run.content()["best_first"]["losses"][-1] == pytest.approx(losses["tuned"], rel=1e-4)


def test_other_inputs_than_the_rankings_own_are_said(tiny, ranking_copy, tmp_path):
    lines = (tiny / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:40]))
    assert OTHER_SPLIT in verify(ranking_copy, "--data", tmp_path / "other.jsonl", fast=FASTEST).err
    assert OTHER_SPLIT in verify(ranking_copy, "--split-seed", "7", fast=FASTEST).err
    changed = json.loads((ranking_copy / "ranking.json").read_text())
    changed["provenance"]["model"]["weights_sha256"] = "0" * 64
    (ranking_copy / "ranking.json").write_text(json.dumps(changed))
    assert (
        "the ranking was made on other weights of the same shapes"
        in verify(ranking_copy, fast=FASTEST).err
    )


def train_auto(folder, output, capsys):
    capsys.readouterr()
    options = ("--ranking", folder, "--budget", "auto", "--steps", "2", "--output", output)
    code = keylayers("train", *options)
    out, err = capsys.readouterr()
    return Run(output, code, out, err)


def test_the_automatic_budget_trains_exactly_the_recommended_modules(verified, tmp_path, capsys):
    run = train_auto(verified.folder, tmp_path / "t", capsys)
    assert run.code == 0
    count = verified.content()["recommendation"]["num_modules"]
    assert 0 < count < NUM_MODULES
    wanted, record = best(verified.folder, count), record_of(tmp_path / "t")
    assert set(record["selection"]["modules"]) == wanted
    assert record["selection"]["num_modules"] == count
    assert record["options"]["budget"] == "auto"
    assert updated_modules(tmp_path / "t") == wanted


def test_the_automatic_budget_needs_a_verification(ranking_copy, tmp_path, capsys):
    line = complaint(train_auto(ranking_copy, tmp_path / "t", capsys))
    assert "the verification of the ranking must exist" in line
    assert "make it with `keylayers verify`" in line
    assert not (tmp_path / "t").exists()


def test_the_automatic_budget_needs_the_ranking_that_was_verified(verified, tmp_path, capsys):
    shutil.copytree(verified.folder, tmp_path / "own")
    path = tmp_path / "own" / "ranking.json"
    content = json.loads(path.read_text())
    content["modules"][3]["score"] += 1.0
    path.write_text(json.dumps(content))
    line = complaint(train_auto(tmp_path / "own", tmp_path / "t", capsys))
    assert "the ranking changed since; run `keylayers verify` again" in line
    assert not (tmp_path / "t").exists()
    assert verify(tmp_path / "own", "--margin", "0.5").code == 0
    assert train_auto(tmp_path / "own", tmp_path / "t", capsys).code == 0


def test_the_automatic_budget_needs_a_fine_tune_that_helps(ranked_full, tmp_path, capsys):
    shutil.copytree(ranked_full, tmp_path / "out")  # weights plus noise
    run = verify(tmp_path / "out")
    losses = run.content()["best_first"]["losses"]
    assert losses[-1] > losses[0]
    assert "normalised area: undefined" in run.out
    line = complaint(train_auto(tmp_path / "out", tmp_path / "t", capsys))
    assert "`budget` auto needs a fine-tune that lowers the held-out loss" in line
    assert not (tmp_path / "t").exists()


def test_an_update_that_holds_no_numbers_is_one_line(tiny, ranking_copy):
    from safetensors.torch import load_file, save_file

    weights = ranking_copy / "adapter" / "adapter_model.safetensors"
    values = {name: value.fill_(float("nan")) for name, value in load_file(weights).items()}
    save_file(values, weights)
    assert "the loss must be finite, but it is nan at batch 1" in complaint(verify(ranking_copy))


def test_a_failed_verify_leaves_an_earlier_file_as_it_was(verified, tmp_path):
    shutil.copytree(verified.folder, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "adapter")
    before = listing(tmp_path / "own")
    complaint(verify(tmp_path / "own"))
    assert listing(tmp_path / "own") == before


def test_another_update_than_the_one_that_was_ranked_is_said(
    tiny, ranking_copy, ranked_full, tmp_path
):
    """As after a second `rank` that ended in stage 2: its adapter lies beside the old ranking."""
    said = "the update differs from the one that was ranked"
    assert said not in verify(ranking_copy, fast=FASTEST).err
    assert said in verify(ranking_copy, "--adapter", tiny / "adapter", fast=FASTEST).err
    assert rank(tiny, tmp_path / "second", "--seed", "5") == 0
    shutil.rmtree(ranking_copy / "adapter")
    shutil.copytree(tmp_path / "second" / "adapter", ranking_copy / "adapter")
    assert said in verify(ranking_copy, fast=FASTEST).err
    folder = shutil.copytree(ranked_full, tmp_path / "tuned")
    assert said not in verify(folder, fast=FASTEST).err
