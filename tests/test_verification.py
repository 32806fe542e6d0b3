# SPDX-License-Identifier: Apache-2.0
"""What a verification says about a ranking, its file, and what the terminal shows of it."""

import io
import json

import pytest

from keylayers.errors import ConfigError, RankingError
from keylayers.files import json_sha256
from keylayers.ranking.curve import MaskCurve
from keylayers.ranking.verification import Verification, auto_budget, verification_file
from keylayers.report.curve import verification_report

from rankings import ranking_of

FALLING = (3.0, 1.6, 1.02, 1.0)  # gains 2 nats; the margin of 5 % is 0.1
COUNTS = (0, 2, 4, 6)


LEFT_OUT = {"leave_one_out": MaskCurve(counts=COUNTS, losses=(3.0, 2.0, 1.5, 1.0))}
BATCHES = {
    "batch_losses": ((3.0, 3.0), (1.5, 1.7), (1.0, 1.04), (1.0, 1.0)),
    "batch_weights": (5.0, 5.0),
}
SIX = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def curve_of(losses, **batches):
    return MaskCurve(counts=COUNTS, losses=tuple(losses), **batches)


def verification_of(best_first=FALLING, random=((3.0, 2.5, 1.5, 1.0),), batches=None, **options):
    return Verification(
        **{"ranking_sha256": "0" * 64} | options,
        best_first=curve_of(best_first, **(batches or {})),
        worst_first=curve_of((best_first[0], 2.9, 2.0, best_first[-1])),
        random=tuple(map(curve_of, random)),
    )


def full_verification():
    made_by = {"options": {"points": 4, "data": "chäts.jsonl"}}
    return verification_of(batches=BATCHES, margin=0.03, provenance=made_by, **LEFT_OUT)


def shown(found):
    """What a terminal shows: a row for each count, no line wider than 120 columns."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(verification_report(found))
    lines = console.file.getvalue().splitlines()
    assert sum(line.strip()[:1].isdigit() for line in lines) == len(COUNTS)
    assert [line for line in lines if len(line) > 120 or "…" in line] == []
    return console.file.getvalue()


def test_the_margin_is_a_share_of_what_the_fine_tune_gained():
    one = verification_of().recommendation
    assert (one.num_modules, one.margin_nats) == (4, pytest.approx(0.1))
    assert one.difference_nats == pytest.approx(0.02)
    assert verification_of(margin=0.35).recommendation.num_modules == 2  # 0.7 nats
    assert verification_of(margin=0.0).recommendation.num_modules == 6
    assert verification_of((1.0, 1.5, 0.2, 1.2)).recommendation is None
    assert verification_of((1.0, 0.5, 0.7, 1.0)).recommendation is None


# best first, random, is some subset better than all by 5 % of what all change?
OVERFIT = [
    ((3.0, 1.6, 1.02, 1.0), [(3.0, 2.5, 1.5, 1.0)], False),
    ((3.0, 1.6, 0.95, 1.0), [(3.0, 2.5, 1.5, 1.0)], False),  # 0.05 of 0.1
    ((3.0, 1.6, 0.85, 1.0), [(3.0, 2.5, 1.5, 1.0)], True),  # 0.15 of 0.1
    ((3.0, 1.6, 1.02, 1.0), [(3.0, 0.8, 1.5, 1.0)], True),  # a random order shows it
    ((3.0, 1.6, 1.02, 1.0), [(3.0, 0.8, 1.5, 1.0), (3.0, 1.2, 1.5, 1.0)], False),  # their mean
    ((1.0, 1.1, 1.1, 2.0), [(1.0, 1.5, 1.8, 2.0)], True),  # no update is better than all
    ((1.0, 1.0, 1.0, 1.0), [(1.0, 1.0, 1.0, 1.0)], False),
]


@pytest.mark.parametrize(("best_first", "random", "expected"), OVERFIT)
def test_an_overfit_fine_tune_has_a_subset_that_is_better_than_all(best_first, random, expected):
    assert verification_of(best_first, random).is_overfit is expected


def test_the_area_of_random_orders_is_their_mean_and_spread():
    # heights 1, 0.5, 0.5, 0 and 1, 1, 0, 0 over equal steps: 0.5 and 0.5; 1, 0, 0, 0: 1/6
    straight, step, sharp = (3.0, 2.0, 2.0, 1.0), (3.0, 3.0, 1.0, 1.0), (3.0, 1.0, 1.0, 1.0)
    assert verification_of(random=[straight, step]).random_area() == pytest.approx((0.5, 0.0))
    mean, spread = verification_of(random=[straight, sharp]).random_area()
    assert mean == pytest.approx((1 / 2 + 1 / 6) / 2)
    assert spread == pytest.approx((1 / 2 - 1 / 6) / 2**0.5)
    assert verification_of(random=[sharp]).random_area() == pytest.approx((1 / 6, 0.0))
    assert verification_of(random=[(1.0, 1.0, 1.0, 2.0)]).random_area() is None
    assert verification_of(random=[straight, sharp]).random_means() == [3.0, 1.5, 1.5, 1.0]


@pytest.mark.parametrize(
    ("found", "concluded"),
    [
        (full_verification(), ({"num_modules": 6, "loss_nats": 1.0}, False, 4)),
        (verification_of((1.0,) * 4), ({"num_modules": 0, "loss_nats": 1.0}, True, None)),
    ],
)
def test_the_file_holds_what_was_found_and_concluded(tmp_path, found, concluded):
    path = tmp_path / "verification.json"
    found.save(path)
    assert Verification.load(path) == found
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["schema"], content["schema_version"]) == ("keylayers/verification", 1)
    assert content["is_overfit"] is False
    curve, recommendation = content["best_first"], content["recommendation"]
    count = recommendation and recommendation["num_modules"]
    assert (curve["best"], curve["normalised_area"] is None, count) == concluded


CURVE = {"counts": [0, 2, 4, 6], "losses": list(FALLING)}
# values in a whole file, and what is said of them
BROKEN = [
    ({"schema": "keylayers/ranking"}, "got 'keylayers/ranking'"),
    ({"schema_version": 2}, "`schema_version` must be 1, got 2"),
    ({"margin": "x"}, "`margin` must be a finite number, got 'x'"),
    ({"margin": 1.5}, "`margin` must be less than 1, got 1.5"),
    ({"random": []}, "at the same counts, with random ones"),
    ({"random": [CURVE | {"counts": [0, 1, 4, 6]}]}, "must be curves at the same counts"),
    ({"provenance": {"options": 3}}, "`provenance.options` must be a mapping"),
    *[
        ({"best_first": CURVE | values}, message)
        for values, message in [
            ({"losses": [1.0]}, "a loss for each of its 4 counts"),
            ({"losses": [10**400, 1, 1, 1]}, "must be a finite number"),
            ({"losses": [float("nan"), 1, 1, 1]}, "must be a finite number"),
            ({"counts": [0, "a", 4, 6]}, "must be a whole number, got 'a'"),
            ({"counts": [0, 4, 2, 6]}, "whose counts rise from 0"),
            ({"batch_weights": [1.0]}, "a loss for each of 1 batches"),
        ]
    ],
]
DAMAGED = [
    (b'{"schema": "keylayers/ver', "damaged or cut off"),
    (b"", "damaged or cut off"),
    (b"\xed\xa0\x80", "damaged or cut off"),
    (b'{"schema": "keylayers/verification", "schema_version": 1}', "got nothing"),
    (b"[]", "must be a mapping"),
    (b"null", "must be a mapping"),
]


@pytest.mark.parametrize(("values", "message"), [*BROKEN, *DAMAGED])
def test_a_broken_file_is_refused_in_one_line(tmp_path, values, message):
    path = tmp_path / "verification.json"
    verification_of().save(path)
    if isinstance(values, dict):
        values = json.dumps(json.loads(path.read_text()) | values).encode()
    path.write_bytes(values)
    with pytest.raises(RankingError, match=message) as caught:
        Verification.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "with `keylayers verify`" in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(RankingError, match=r"no '.*none\.json'; make it with `keylayers verify`"):
        Verification.load(tmp_path / "none.json")
    with pytest.raises(RankingError, match="cannot be read: Is a directory"):
        Verification.load(tmp_path)


def test_the_file_lies_beside_the_ranking(tmp_path):
    assert verification_file(tmp_path) == tmp_path / "verification.json"
    assert verification_file(str(tmp_path / "ranking.json")) == tmp_path / "verification.json"


def auto_budget_of(ranking, folder, **options):
    """The automatic budget of a ranking that was verified as it is."""
    found = verification_of(ranking_sha256=json_sha256(ranking.to_json()), **options)
    found.save(folder / "verification.json")
    return auto_budget(ranking, folder / "verification.json")


@pytest.mark.parametrize(
    ("measured_with", "what"),
    [
        ({"model": {"weights_sha256": "other"}}, "model"),
        ({"adapter": {"weights_sha256": "other"}}, "update"),
        ({"data": {"split_sha256": "other"}}, "data or split"),
        ({"adapter": {"weights_sha256": "update"}, "data": {"split_sha256": "split"}}, None),
        ({}, None),
    ],
)
def test_the_automatic_budget_is_recommended_by_a_curve_of_the_same_run(
    tmp_path, measured_with, what
):
    made_by = {
        "model": {"weights_sha256": "model"},
        "data": {"split_sha256": "split"},
        "stage_1": {"num_steps": 1, "stopped_by": "", "seconds": 1.0, "adapter_sha256": "update"},
    }
    ranking = ranking_of(SIX, provenance=made_by)
    if what is None:
        assert auto_budget_of(ranking, tmp_path, provenance=measured_with).value == 4
        return
    with pytest.raises(RankingError, match=f"was measured with another {what}; run"):
        auto_budget_of(ranking, tmp_path, provenance=measured_with)


def test_the_automatic_budget_is_refused_where_there_is_none(tmp_path):
    ranking, path = ranking_of(SIX), tmp_path / "verification.json"
    for losses, does in {(1.0, 0.9, 0.9, 1.2): "raises it", (1.0,) * 4: "changes nothing"}.items():
        message = f"a fine-tune that lowers the held-out loss, but this fine-tune {does}"
        with pytest.raises(ConfigError, match=message):
            auto_budget_of(ranking, tmp_path, best_first=losses)
    with pytest.raises(RankingError, match="the ranking changed since; run `keylayers verify` ag"):
        auto_budget(ranking_of([*SIX[:-1], 1.5]), path)
    path.unlink()
    message = "the verification of the ranking must exist, but there is no"
    with pytest.raises(RankingError, match=message):
        auto_budget(ranking, path)


def test_the_report_has_a_row_for_each_count_and_a_recommendation():
    text = shown(full_verification())
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == list(COUNTS)
    assert [row[1] for row in rows] == [f"{loss:.4f}" for loss in FALLING]
    assert [row[-1] for row in rows] == ["3.0000", "2.0000", "1.5000", "1.0000"]
    assert [row[-2] for row in rows] == ["3.0000", "2.9000", "2.0000", "1.0000"]
    # heights 1, 0.3, 0.01, 0; random 1, 0.75, 0.25, 0; worst 1, 0.95, 0.5, 0; one out 1, 0.5, 0.25
    areas = ("0.270", "random orders 0.500", "worst first 0.650", "leave-one-out 0.417")
    assert f"normalised area (0 is best): {', '.join(areas)}" in text
    assert "base 3.0000, all 6 modules 1.0000, best point 1.0000 with 6 modules" in text
    assert "recommended budget: 4 of 6 modules, which lose +0.0200 nats against all" in text
    assert "the margin is 0.0600, 3 % of what the fine-tune gained" in text
    assert "hurt" not in text


# a verification and what is said of it; every report is also checked by `shown`
REPORTED = {
    "one random order": ({}, ["recommended budget: 4 of 6"]),
    "several": (
        {"random": [(3.0, 2.0, 2.0, 1.0), (3.0, 1.0, 1.0, 1.0)], "margin": 0.0333} | LEFT_OUT,
        ["1.5000 ± 0.707"],
    ),
    "overfit": (
        {"best_first": (3.0, 1.6, 0.7, 1.0)},
        ["some updates hurt", "best point 0.7000 with 4 modules", "train for fewer steps"],
    ),
    "undefined": (
        {"best_first": (1.0, 1.1, 1.2, 1.3)} | LEFT_OUT,
        [
            "normalised area: undefined, because all updates together do not lower the",
            "no budget is recommended: the fine-tune as a whole does not help",
        ],
    ),
    "flat": ({"best_first": (1.0,) * 4, "random": [(1.0,) * 4]}, ["no budget is recommended"]),
    "large": (
        {
            "best_first": (30.0, 16.0, 10.2, 10.0),
            "random": [(30.0, 25.0, 15.0, 10.0)] * 3,
            "leave_one_out": curve_of((30.0, 20.0, 15.0, 10.0)),
        },
        ["25.0000 ± 0.000"],
    ),
}


@pytest.mark.parametrize("name", REPORTED)
def test_the_report_says_what_the_curves_mean(name):
    options, said = REPORTED[name]
    text = " ".join(shown(verification_of(**options)).split())
    assert [line for line in said if line not in text] == []
    assert ("recommended budget" in text) == ("no budget is recommended" not in text)
    assert (" ± " in text) == (len(options.get("random", [0])) > 1)
