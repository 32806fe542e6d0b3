# SPDX-License-Identifier: Apache-2.0
"""What a verification says about a ranking, its file, and what the terminal shows of it."""

import io
import json

import pytest
from rich.console import Console

from keylayers.errors import ConfigError, RankingError
from keylayers.files import json_sha256
from keylayers.ranking.verification import MaskCurve, Verification, auto_budget, verification_file
from keylayers.report.curve import verification_report

from rankings import ranking_of

FALLING = (3.0, 1.6, 1.02, 1.0)  # gains 2 nats; the margin of 5 % is 0.1
FLAT = (1.0, 1.0, 1.0, 1.0)
COUNTS = (0, 2, 4, 6)
RANDOM = (3.0, 2.5, 1.5, 1.0)
SIX = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def curve_of(losses):
    batches = tuple((loss, loss) for loss in losses)
    return MaskCurve(
        counts=COUNTS, losses=tuple(losses), batch_losses=batches, batch_weights=(5.0, 5.0)
    )


LEFT_OUT = {"leave_one_out": curve_of((3.0, 2.0, 1.5, 1.0))}


def verification_of(best_first=FALLING, random=(RANDOM,), **options):
    return Verification(
        **{"ranking_sha256": "0" * 64} | options,
        best_first=curve_of(best_first),
        worst_first=curve_of((best_first[0], 2.9, 2.0, best_first[-1])),
        random=tuple(map(curve_of, random)),
    )


# best first, random orders, the margin as a share of the gain -> modules that are recommended,
# and whether some subset is better than all by 5 % of what all change
FOUND = [
    (FALLING, [RANDOM], 0.05, 4, False),
    (FALLING, [RANDOM], 0.35, 2, False),  # 0.7 nats
    (FALLING, [RANDOM], 0.0, 6, False),
    ((3.0, 1.6, 0.95, 1.0), [RANDOM], 0.05, 4, False),  # 0.05 of 0.1
    ((3.0, 1.6, 0.85, 1.0), [RANDOM], 0.05, 4, True),  # 0.15 of 0.1
    (FALLING, [(3.0, 0.8, 1.5, 1.0)], 0.05, 4, True),  # a random order shows it
    (FALLING, [(3.0, 0.8, 1.5, 1.0), (3.0, 1.2, 1.5, 1.0)], 0.05, 4, False),  # their mean
    ((1.0, 1.1, 1.1, 2.0), [(1.0, 1.5, 1.8, 2.0)], 0.05, None, True),  # none is better than all
    ((1.0, 0.5, 0.7, 1.0), [FLAT], 0.05, None, True),
    (FLAT, [FLAT], 0.05, None, False),
]


@pytest.mark.parametrize("case", FOUND)
def test_the_file_holds_what_was_found_and_concluded(tmp_path, case):
    best_first, random, margin, count, is_overfit = case
    made_by = {"options": {"points": 4, "data": "chäts.jsonl"}}
    found = verification_of(best_first, random, margin=margin, provenance=made_by, **LEFT_OUT)
    path = tmp_path / "verification.json"
    found.save(path)
    assert Verification.load(path) == found
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["schema"], content["schema_version"]) == ("keylayers/verification", 1)
    assert (content["recommendation"] or {}).get("num_modules") == count
    assert content["is_overfit"] is found.is_overfit is is_overfit
    curve, area = content["best_first"], found.best_first.normalised_area
    assert (curve["normalised_area"], curve["best"]["loss_nats"]) == (area, min(best_first))


def curve(**values):
    return {"counts": list(COUNTS), "losses": list(FALLING)} | values


# values in a whole file or all of its bytes, and what is said of them
BROKEN = [
    ({"schema": "keylayers/ranking"}, "got 'keylayers/ranking'"),
    ({"schema_version": 2}, "`schema_version` must be 1, got 2"),
    ({"margin": "x"}, "`margin` must be a finite number, got 'x'"),
    ({"margin": 1.5}, "`margin` must be less than 1, got 1.5"),
    ({"random": []}, "at the same counts, with random ones"),
    ({"random": [curve(counts=[0, 1, 4, 6])]}, "must be curves at the same counts"),
    ({"provenance": {"options": 3}}, "`provenance.options` must be a mapping"),
    ({"best_first": curve(losses=[1.0])}, "a loss for each of its 4 counts"),
    ({"best_first": curve(losses=[10**400, 1, 1, 1])}, "must be a finite number"),
    ({"best_first": curve(losses=[float("nan"), 1, 1, 1])}, "must be a finite number"),
    ({"best_first": curve(counts=[0, "a", 4, 6])}, "must be a whole number, got 'a'"),
    ({"best_first": curve(counts=[0, 4, 2, 6])}, "whose counts rise from 0"),
    ({"best_first": curve(batch_weights=[1.0])}, "a loss for each of 1 batches"),
    (b'{"schema": "keylayers/ver', "damaged or cut off"),
    (b"", "damaged or cut off"),
    (b"\xed\xa0\x80", "damaged or cut off"),
    (b'{"schema": "keylayers/verification", "schema_version": 1}', "got nothing"),
    (b"[]", "must be a mapping"),
    (None, r"no '.*n\.json'; make it with `keylayers verify`"),
]


@pytest.mark.parametrize(("values", "message"), BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, values, message):
    path = tmp_path / "verification.json"
    if isinstance(values, dict):
        verification_of().save(path)
        values = json.dumps(json.loads(path.read_text()) | values).encode()
    if values is not None:
        path.write_bytes(values)
    with pytest.raises(RankingError, match=message) as caught:
        Verification.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "with `keylayers verify`" in str(caught.value)


def test_the_file_lies_beside_the_ranking(tmp_path):
    assert verification_file(tmp_path) == tmp_path / "verification.json"
    assert verification_file(str(tmp_path / "ranking.json")) == tmp_path / "verification.json"
    with pytest.raises(RankingError, match="cannot be read: Is a directory"):
        Verification.load(tmp_path)


MADE_BY = {
    "model": {"weights_sha256": "model"},
    "data": {"split_sha256": "split"},
    "stage_1": {"num_steps": 1, "stopped_by": "", "seconds": 1.0, "adapter_sha256": "update"},
}
SAME = {"adapter": {"weights_sha256": "update"}, "data": {"split_sha256": "split"}}
OTHER = json_sha256(ranking_of([*SIX[:-1], 1.5], provenance=MADE_BY).to_json())  # by one score
NEEDS = "a fine-tune that lowers the held-out loss, but this fine-tune "
# what a ranking was verified with, and the automatic budget or what it is refused for
AUTO = [
    ({"provenance": SAME}, 4),
    ({}, 4),
    ({"provenance": {"model": {"weights_sha256": "x"}}}, "measured with another model; run"),
    ({"provenance": {"adapter": {"weights_sha256": "x"}}}, "measured with another update; run"),
    ({"provenance": {"data": {"split_sha256": "x"}}}, "measured with another data or split; run"),
    ({"best_first": (1.0, 0.9, 0.9, 1.2)}, NEEDS + "raises it"),
    ({"best_first": FLAT}, NEEDS + "changes nothing"),
    ({"ranking_sha256": OTHER}, "the ranking changed since; run `keylayers verify` again"),
    (None, "the verification of the ranking must exist, but there is no"),
]


@pytest.mark.parametrize(("options", "expected"), AUTO)
def test_auto_takes_what_a_curve_of_the_same_run_recommends(tmp_path, options, expected):
    ranking, path = ranking_of(SIX, provenance=MADE_BY), tmp_path / "verification.json"
    if options is not None:
        own = {"ranking_sha256": json_sha256(ranking.to_json())}
        verification_of(**own | options).save(path)
    if isinstance(expected, int):
        assert auto_budget(ranking, path).value == expected
        return
    with pytest.raises((ConfigError, RankingError), match=expected):
        auto_budget(ranking, path)


def shown(found):
    """What a terminal shows, with single spaces; no line is wider than 120 columns."""
    console = Console(file=io.StringIO(), width=120, highlight=False)
    console.print(verification_report(found))
    lines = console.file.getvalue().splitlines()
    assert [line for line in lines if len(line) > 120 or "…" in line] == []
    last = [curve for curve in (found.worst_first, found.leave_one_out) if curve]
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [(*row[:2], *row[-len(last) :]) for row in rows] == [
        (str(count), *(f"{curve.losses[at]:.4f}" for curve in (found.best_first, *last)))
        for at, count in enumerate(COUNTS)
    ]
    return " ".join(" ".join(lines).split())


# a verification and what is said of it
REPORTED = {
    # heights 1, 0.3, 0.01, 0; random 1, 0.75, 0.25, 0; worst 1, 0.95, 0.5, 0; one out 1, 0.5, 0.25
    "one random order": (
        {"margin": 0.03} | LEFT_OUT,
        "normalised area (0 is best): 0.270, random orders 0.500, worst first 0.650, leave-one-out",
        "leave-one-out 0.417",
        "base 3.0000, all 6 modules 1.0000, best point 1.0000 with 6 modules",
        "recommended budget: 4 of 6 modules, which lose +0.0200 nats against all",
        "the margin is 0.0600, 3 % of what the fine-tune gained",
    ),
    # the areas of the random orders are 1 / 2 and 1 / 6
    "several": (
        {"random": [(3.0, 2.0, 2.0, 1.0), (3.0, 1.0, 1.0, 1.0)], "margin": 0.0333},
        "1.5000 ± 0.707", "random orders 0.333 ± 0.236",
    ),
    "overfit": (
        {"best_first": (3.0, 1.6, 0.7, 1.0)},
        "some updates hurt", "best point 0.7000 with 4 modules", "train for fewer steps",
    ),
    "undefined": (
        {"best_first": (1.0, 1.1, 1.2, 1.3)} | LEFT_OUT,
        "normalised area: undefined, because all updates together do not lower the",
        "no budget is recommended: the fine-tune as a whole does not help",
    ),
    "flat": ({"best_first": FLAT, "random": [FLAT]}, "no budget is recommended"),
    "large": (
        {"best_first": (30.0, 16.0, 10.2, 10.0), "random": [(30.0, 25.0, 15.0, 10.0)] * 3}
        | {"leave_one_out": curve_of((30.0, 20.0, 15.0, 10.0))},
        "25.0000 ± 0.000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_the_report_says_what_the_curves_mean(name):
    options, *said = REPORTED[name]
    text = shown(verification_of(**options))
    assert [part for part in said if part not in text] == []
    assert ("recommended budget" in text) == ("no budget is recommended" not in text)
    assert ("hurt" in text) == (name in ("overfit", "undefined"))
    assert (" ± " in text) == (len(options.get("random", [0])) > 1)
