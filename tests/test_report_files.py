# SPDX-License-Identifier: Apache-2.0
"""Reports and figures as files: names, formats, refusals; what is in them without a browser."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from commands import complaint, keylayers
from keylayers.ranking.ranking import Ranking

from rankings import ranking_of

SCORES = [0.4, 0.1, None, 0.3, 0.3, -0.1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with rankings `one` and `two`."""
    for name, scores in (("one", SCORES), ("two", [*SCORES[1:], 0.7])):
        (tmp_path / name).mkdir()
        ranking_of(scores).save(tmp_path / name / "ranking.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def verified(folder):
    """The same, with a verification of ranking `one`, as `keylayers verify` leaves it."""
    from keylayers.files import json_sha256
    from keylayers.ranking.curve import MaskCurve
    from keylayers.ranking.verification import Verification

    def curve(*losses):
        return MaskCurve(counts=tuple(range(len(losses))), losses=losses)

    Verification(
        ranking_sha256=json_sha256(Ranking.load(folder / "one").to_json()),
        best_first=curve(3.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.0),
        worst_first=curve(3.0, 2.9, 2.8, 2.5, 2.0, 1.5, 1.0),
        random=(curve(3.0, 2.5, 2.0, 1.8, 1.5, 1.2, 1.0),),
    ).save(folder / "one" / "verification.json")
    return folder


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]+)</text>", Path(svg).read_text())


BEGINNINGS = {".pdf": b"%PDF-", ".png": b"\x89PNG", ".svg": b"<svg", ".PDF": b"%PDF-"}


@pytest.mark.parametrize("kind", ["heatmap", "agreement"])
def test_a_figure_has_the_format_of_its_ending(folder, kind):
    paths = {ending: folder / f"fig-2-{kind}{ending}" for ending in BEGINNINGS}
    assert keylayers("show", "one", "two", "--figure", *paths.values()) == 0
    assert all(path.read_bytes().startswith(BEGINNINGS[end]) for end, path in paths.items())


def test_a_heatmap_shows_the_ranks_of_what_is_taken(folder):
    assert keylayers("show", "one", "--figure", "heatmap.svg", "--budget", "3") == 0
    marks = ElementTree.parse("heatmap.svg").findall(
        ".//*[@class='mark-text role-mark layer_2_marks']/*"
    )
    assert [mark.text for mark in marks] == ["1", "2", "2"]  # two share a rank
    assert {"a_proj", "b_proj", "block", "rank", "?"} <= set(texts("heatmap.svg"))


def test_figures_of_several_rankings_name_each_and_show_jaccard_with_its_chance(folder):
    from keylayers.ranking.compare import agreement

    figures = ("--figure", "heatmap.svg", "agreement.svg")
    assert keylayers("show", "one", "two", *figures, "--budget", "2") == 0
    assert {"one", "two"} <= set(texts("heatmap.svg"))
    pair = agreement([Ranking.load(folder / name) for name in ("one", "two")], 2)[0]
    cell = f"{pair.jaccard:.2f} ({pair.chance_jaccard:.2f})"
    assert texts("agreement.svg").count(cell) == 2


def test_a_curve_shows_its_controls_and_the_recommended_budget(verified):
    assert keylayers("show", "one", "--figure", "curve.svg", "--budget", "2") == 0
    shown = {"best first", "random (± sd)", "worst first", "recommended", "this budget"}
    assert shown <= set(texts("curve.svg"))


def test_losses_are_drawn_from_a_real_run(ranked, tmp_path):
    assert keylayers("show", ranked, "--figure", tmp_path / "losses.svg") == 0
    shown = {"stage 1, training", "held out, base", "held out, tuned"}
    assert shown <= set(texts(tmp_path / "losses.svg"))


REFUSED = [
    (["one", "--figure", "map.pdf"], "the name of a `figure` must say what it shows, one of"),
    (["one", "--figure", "heatmap-curve.pdf"], "must say what it shows, one of heatmap, curve"),
    (["one", "--figure", "heatmap.jpg"], "must end in .pdf or .svg or .png, got"),
    (["one", "--figure", "curve.pdf"], "but it is missing; run `keylayers verify`"),
    (["one", "--figure", "losses.pdf"], "needs a ranking whose own run trained"),
    (["one", "--figure", "agreement.pdf"], "needs at least two rankings, got 1"),
    (["one", "--html", "report.pdf"], "`html` must end in .html, got"),
    (["one", "--html", "nowhere/report.html"], "must be a place that can be written"),
    (["one", "--html", "r.html", "--budget", "6"], "it takes 6 and only 5 have one"),
    (["one", "--html", "r.html", "--figure", "heatmap.svg", "curve.svg"], "but it is missing"),
    (["one", "two", "--json"], "`json` must be given with one ranking"),
    (["one", "--json", "--html", "r.html"], "`json` must be given with one ranking"),
    (["nothing", "--html", "r.html"], "the ranking file must exist"),
    ([], "`show` needs at least one ranking, got none"),
    (
        ["costly.json", "--html", "r.html", "--budget", "0.6x-time"],
        "must take the best modules",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(folder, capsys, arguments, line):
    ranking_of([1.0, *[0.9] * 5], num_parameters=1_000_000).save("costly.json")
    before = sorted(folder.rglob("*"))
    assert keylayers("show", *arguments) == 2
    assert line in complaint(capsys)
    assert sorted(folder.rglob("*")) == before


def test_a_curve_of_an_earlier_ranking_is_refused_and_named(verified, capsys):
    ranking_of([0.5, *SCORES[1:]]).save("one/ranking.json")
    assert keylayers("show", "one", "--figure", "curve.pdf") == 2
    assert "but it is of an earlier ranking; run `keylayers verify`" in complaint(capsys)
    assert keylayers("show", "one", "--html", "r.html") == 0
    assert "belongs to an earlier one" in Path("r.html").read_text()


def test_without_the_extra_the_line_says_what_to_install(folder, monkeypatch, capsys):
    from keylayers.commands import show

    monkeypatch.setattr(show, "NEEDED", (*show.NEEDED, "no_such_library"))
    assert keylayers("show", "one", "--html", "r.html") == 2
    line = complaint(capsys)
    assert "need no_such_library, which is not installed; install keylayers[report]" in line


def test_a_report_of_a_model_of_the_usual_size_can_be_mailed(tmp_path):
    """224 modules, as Llama-3.1-8B has, with a loss curve of 1,000 steps."""
    losses = [3.0 - step / 1000 for step in range(1000)]
    made_by = {"stage_1": {"num_steps": 1000, "stopped_by": "cap", "seconds": 1, "losses": losses}}
    scores = [1 / (1 + index) for index in range(224)]
    ranking_of(scores, provenance=made_by).save(tmp_path / "r.json")
    assert keylayers("show", tmp_path / "r.json", "--html", tmp_path / "r.html") == 0
    assert (tmp_path / "r.html").stat().st_size < 1.5e6


def test_the_same_report_twice_is_the_same_file(folder):
    for name in ("a.html", "b.html"):
        assert keylayers("show", "one", "two", "--html", name) == 0
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


def test_rankings_that_cannot_be_compared_are_still_shown(folder):
    one = Ranking.load(folder / "one")
    other = tuple(
        replace(module, name=f"x.{module.name}", projection="x") for module in one.modules
    )
    replace(one, modules=other).save("two/ranking.json")
    assert keylayers("show", "one", "two", "--html", "r.html") == 0
    line = "Not compared: rankings of different modules must share"
    assert line in Path("r.html").read_text()


def test_half_characters_in_a_name_are_shown_as_such(folder):
    text = Path("one/ranking.json").read_text().replace("model.layers.0.a", "\\ud800")
    Path("r.json").write_text(text)
    assert keylayers("show", "r.json", "--html", "r.html", "--figure", "heatmap.svg") == 0


PATHS = [
    (["out"], ["out"]),
    (["out/ranking.json"], ["out"]),
    (["a/out", "b/out"], ["a/out", "b/out"]),
    (["a/ranking.json", "b/ranking.json"], ["a", "b"]),
    (["a/x.json", "a/y.json"], ["x", "y"]),
    (["a/x.json", "b/x.json", "b/y.json"], ["a/x", "b/x", "b/y"]),
]


@pytest.mark.parametrize(("paths", "names"), PATHS)
def test_labels_are_the_shortest_ends_of_the_paths_that_differ(paths, names):
    from keylayers.report.source import labels

    assert labels([Path(path) for path in paths]) == names
    assert len(set(labels([Path("out"), Path("out/ranking.json")]))) == 2  # given twice


def test_the_range_of_budgets_is_where_a_place_is_undecided():
    from keylayers.ranking.certainty import undecided
    from keylayers.report.html import open_budgets

    errors = [0.0, 0.02, 0.04, 0.06, 0.08, 0.1, None, 0.14]
    ranking = ranking_of([0.9, 0.5, 0.5, 0.48, 0.2, 0.1, None, 0.19], errors=errors)
    ranges = open_budgets(ranking)
    assert ranges
    for count in range(1, 8):
        within = {name for name, (least, most) in ranges.items() if least <= count <= most}
        assert within == set(undecided(ranking, count))


def test_reports_and_figures_import_no_torch(folder):
    code = (
        "import sys; from keylayers.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert 'altair' in sys.modules; assert 'torch' not in sys.modules"
    )
    arguments = ("show", "one", "two", "--html", "r.html", "--figure", "heatmap.pdf")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)


REPEATED = {
    "keylayers rank --model m --data d --seed 3": {
        "options": {"model": "m", "data": "d", "seed": 3}
    },
    "keylayers train --rank-first --model m --data d --window 5": {
        "options": {"rank_first": True, "model": "m", "data": "d", "window": 5}
    },
    "keylayers import snr.json --model 'a b'": {
        "imported": {"tool": "Spectrum", "file": "snr.json"},
        "model": {"name": "a b"},
    },
    "rank_modules on a DPOTrainer": {"options": {"method": "path"}, "trainer": "DPOTrainer"},
    "made from Python": {},
}


@pytest.mark.parametrize("text", REPEATED)
def test_how_to_make_a_ranking_again(text):
    from keylayers.commands.repeat import how_to_repeat

    assert text in how_to_repeat(ranking_of([1.0], provenance=REPEATED[text]))
