# SPDX-License-Identifier: Apache-2.0
"""Reports and figures as files: names, formats, refusals; what is in them without a browser."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from commands import complaint, keylayers
from keylayers.commands.repeat import how_to_repeat
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking
from keylayers.report import source
from keylayers.report.source import labels

from rankings import ranking_of, verification_of

SCORES = [0.4, 0.1, None, 0.3, 0.3, -0.1]
LOSSES = [3.0 - step / 1000 for step in range(1000)]
TRAINED = {
    "stage_1": {"num_steps": 1000, "stopped_by": "cap", "seconds": 1, "losses": LOSSES},
    "mask": {"losses": [2.0, 1.9], "seconds": 1, "learning_rate": 0.1},
    "held_out_loss_nats": {"base": 3.0, "tuned": 2.0},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with rankings `one`, of a run and verified, and `two`."""
    one, two = ranking_of(SCORES, provenance=TRAINED), ranking_of([*SCORES[1:], 0.7])
    for name, ranking in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        ranking.save(tmp_path / name / "ranking.json")
    verification_of(one).save(tmp_path / "one" / "verification.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]+)</text>", Path(svg).read_text())


BEGINNINGS = {".pdf": b"%PDF-", ".png": b"\x89PNG", ".svg": b"<svg", ".PDF": b"%PDF-"}
SHOWN = {
    "heatmap": {"one", "two", "a_proj", "b_proj", "block", "rank", "?"},
    "agreement": {"one", "two"},
    "curve": {"best first", "random (± sd)", "worst first", "recommended", "this budget"},
    "losses": {"stage 1, training", "stage 2, learning the scores", "held out, base"},
}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_figure_has_the_format_of_its_ending_and_what_its_name_says(folder, kind):
    paths = {ending: folder / f"fig-2-{kind}{ending}" for ending in BEGINNINGS}
    rankings = ("one", "two") if kind in ("heatmap", "agreement") else ("one",)
    assert keylayers("show", *rankings, "--figure", *paths.values(), "--budget", "2") == 0
    assert all(path.read_bytes().startswith(BEGINNINGS[end]) for end, path in paths.items())
    assert SHOWN[kind] <= set(texts(paths[".svg"]))


def test_figures_show_the_ranks_of_what_is_taken_and_jaccard_with_its_chance(folder):
    assert keylayers("show", "one", "--figure", "heatmap.svg", "--budget", "3") == 0
    marks = ElementTree.parse("heatmap.svg").findall(
        ".//*[@class='mark-text role-mark layer_2_marks']/*"
    )
    assert [mark.text for mark in marks] == ["1", "2", "2"]  # two share a rank
    assert keylayers("show", "one", "two", "--figure", "agreement.svg", "--budget", "2") == 0
    (pair,) = agreement([Ranking.load(name) for name in ("one", "two")], 2)
    cell = f"{pair.jaccard:.2f} ({pair.chance_jaccard:.2f})"
    assert texts("agreement.svg").count(cell) == 2


REFUSED = [
    ("one --figure map.pdf", "the name of a `figure` must say what it shows, one of"),
    ("one --figure heatmap-curve.pdf", "must say what it shows, one of heatmap, curve"),
    ("one --figure heatmap.jpg", "must end in .pdf or .svg or .png, got"),
    ("two --figure curve.pdf", "but it is missing; run `keylayers verify`"),
    ("two --figure losses.pdf", "needs a ranking whose own run trained"),
    ("one --figure agreement.pdf", "needs at least two rankings, got 1"),
    ("one --html report.pdf", "`html` must end in .html, got"),
    ("one --html nowhere/report.html", "must be a place that can be written"),
    ("one --html r.html --budget 6", "it takes 6 and only 5 have one"),
    ("two --html r.html --figure heatmap.svg curve.svg", "but it is missing"),
    ("one two --json", "`json` must be given with one ranking"),
    ("one --json --html r.html", "`json` must be given with one ranking"),
    ("nothing --html r.html", "the ranking file must exist"),
    ("", "`show` needs at least one ranking, got none"),
    ("costly.json --html r.html --budget 0.6x-time", "must take the best modules"),
]


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(folder, capsys, words, line):
    ranking_of([1.0, *[0.9] * 5], num_parameters=1_000_000).save("costly.json")
    before = sorted(folder.rglob("*"))
    assert keylayers("show", *words.split()) == 2
    assert line in complaint(capsys)
    assert sorted(folder.rglob("*")) == before


def test_a_curve_of_an_earlier_ranking_is_refused_and_named(folder, capsys):
    ranking_of([0.5, *SCORES[1:]]).save("one/ranking.json")
    assert keylayers("show", "one", "--figure", "curve.pdf") == 2
    assert "but it is of an earlier ranking; run `keylayers verify`" in complaint(capsys)
    assert keylayers("show", "one", "--html", "r.html") == 0
    assert "belongs to an earlier one" in Path("r.html").read_text()


def test_without_the_extra_the_line_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr(source, "CHART_PACKAGES", (*source.CHART_PACKAGES, "no_such_library"))
    assert keylayers("show", "one", "--html", "r.html") == 2
    line = complaint(capsys)
    assert "need no_such_library, which is not installed; `pip install 'keylayers[report]'`" in line


def test_a_report_of_a_model_of_the_usual_size_can_be_mailed_and_is_the_same_twice(folder):
    """224 modules, as Llama-3.1-8B has, with a loss curve of 1,000 steps."""
    ranking_of([1 / (1 + index) for index in range(224)], provenance=TRAINED).save("large.json")
    for name in ("a.html", "b.html"):
        assert keylayers("show", "large.json", "two", "--html", name) == 0
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()
    assert Path("a.html").stat().st_size < 1.5e6


def test_rankings_that_cannot_be_compared_are_still_shown(folder):
    """One of the names has half a character, which UTF-8 cannot write."""
    one = Ranking.load("one")
    other = (replace(module, name=f"x.{module.name}", projection="x") for module in one.modules)
    replace(one, modules=tuple(other)).save("other.json")
    text = Path("other.json").read_text().replace("model.layers.0.a", "\\ud800")
    Path("other.json").write_text(text)
    assert (
        keylayers("show", "one", "other.json", "--html", "r.html", "--figure", "heatmap.svg") == 0
    )
    line = "Not compared: rankings of different modules must share"
    assert line in Path("r.html").read_text()


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
    assert labels([Path(path) for path in paths]) == names
    assert len(set(labels([Path("out"), Path("out/ranking.json")]))) == 2  # given twice


OPTIONS = {"model": "m", "data": "d"}
IMPORTED = {"tool": "Spectrum", "file": "snr.json"}
REPEATED = {
    "keylayers rank --model m --data d --seed 3": {"options": OPTIONS | {"seed": 3}},
    "train --rank-first --model m --data d": {"options": {"rank_first": True} | OPTIONS},
    "keylayers import snr.json --model 'a b'": {"imported": IMPORTED, "model": {"name": "a b"}},
    "rank_modules on a DPOTrainer": {"options": {"method": "path"}, "trainer": "DPOTrainer"},
    "made from Python": {},
}


@pytest.mark.parametrize("text", REPEATED)
def test_how_to_make_a_ranking_again(text):
    ranking = ranking_of([1.0], provenance=REPEATED[text])
    assert text in how_to_repeat(ranking, "r.json")
    written = text.startswith("keylayers rank")
    assert how_to_repeat(ranking, "out/ranking.json").endswith(" --output out") == written


def test_figures_of_parts_show_the_kept_ranks_and_the_curve_over_parameters(folder):
    whole = ranking_of([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    modules = tuple(
        replace(module, part_scores=(module.score, 0.1), part_parameters=(10, 10))
        for module in whole.modules
    )
    ranking = replace(whole, modules=modules, granularity="part")
    (folder / "parts").mkdir()
    ranking.save(folder / "parts" / "ranking.json")
    found = verification_of(ranking)

    def sized(curve):
        return curve.model_copy(update={"num_parameters": (0, 10, 20, 40, 60, 90, 120)})

    replaced = {"best_first": sized(found.best_first), "worst_first": sized(found.worst_first)}
    replaced |= {"random": tuple(map(sized, found.random))}
    replaced |= {"rivals": {"energy": replaced["worst_first"]}}
    found.model_copy(update=replaced).save(folder / "parts" / "verification.json")
    figures = ("--figure", "heatmap.svg", "curve.svg", "--html", "report.html")
    assert keylayers("show", "parts", *figures, "--budget", "0.25x-params") == 0
    marks = ElementTree.parse("heatmap.svg").findall(
        ".//*[@class='mark-text role-mark layer_1_marks']/*"
    )
    assert [mark.text for mark in marks] == ["1", "1", "1", "0", "0", "0"]
    shown = {"best first", "worst first", "best by singular values", "this budget", "recommended"}
    assert shown | {"parameters of the parts that are kept"} <= set(texts("curve.svg"))
    assert "33.3 % of the adapter carry 95.0 % of the gain" in Path("report.html").read_text()
