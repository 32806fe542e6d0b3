# SPDX-License-Identifier: Apache-2.0
"""The HTML report in a real browser: what it shows is what the ranking and `select()` say."""

import json
import re
from dataclasses import replace

import pytest

from browser import browser, needs_chromium, page_of
from commands import keylayers, rank

from rankings import ranking_of

pytestmark = [pytest.mark.long, needs_chromium]
HOSTILE = (
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "\"onmouseover='window.hacked=1'",
    "{{ 7 * 7 }} & <!-- ",
    "'); window.hacked=1; //",
)
SCORES = [0.9, 0.5, 0.5, 0.45, 0.5, 0.1, 0.05, -0.2, None, 0.3, 0.0, 0.02]


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


def by_hand():
    """Ties, a module without a score, standard errors on most, and one outside the blocks."""
    sizes = [10 * (index + 1) for index in range(len(SCORES))]
    ranking = ranking_of(SCORES, num_parameters=sizes)
    modules = [
        replace(one, standard_error=None if one.score is None or index == 1 else 0.04)
        for index, one in enumerate(ranking.modules)
    ]
    modules[0] = replace(modules[0], name="model.embed_tokens", block_index=None)
    return replace(ranking, modules=tuple(modules))


def report(folder, rankings, *more):
    paths = []
    for name, ranking in rankings.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        ranking.save(folder / name / "ranking.json")
        paths.append(folder / name)
    output = folder / "report.html"
    assert keylayers("show", *paths, "--html", output, *more) == 0
    return output


@pytest.fixture(scope="module")
def verified(tiny, tmp_path_factory):
    """A report of a ranking from a real run with its verification."""
    folder = tmp_path_factory.mktemp("verified")
    one = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--max-steps", "6")
    more = ("--batch-size", "4", "--lora-rank", "4", "--method", "price", "--mask-steps", "20")
    assert keylayers("rank", *one, *more, "--output", folder / "a") == 0
    assert keylayers("verify", "--ranking", folder / "a", "--random-orders", "2") == 0
    assert rank(tiny, folder / "b", "--seed", "1") == 0
    assert keylayers("show", folder / "a", folder / "b", "--html", folder / "report.html") == 0
    return folder


def set_budget(page, count):
    page.locator("section.ranking:visible input[type=range]").fill(str(count))


def trained(page, section="section.ranking:visible"):
    rows = page.locator(f"{section} table.modules tbody tr.is-trained .name")
    return set(rows.all_inner_texts())


def percent(share):
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def column(page, number):
    rows = page.locator("section.ranking:visible table.modules tbody tr:visible")
    return rows.locator(f"td:nth-child({number})").all_inner_texts()


def test_the_slider_shows_what_select_takes_at_every_budget(chromium, tmp_path):
    from keylayers.ranking.certainty import undecided

    ranking = by_hand()
    with page_of(chromium, report(tmp_path, {"hand": ranking})) as page:
        slider = page.locator("input[type=range]")
        assert slider.get_attribute("max") == "11"  # one of the twelve has no score
        total = sum(one.num_parameters for one in ranking.modules)
        for count in range(1, 12):
            set_budget(page, count)
            chosen = ranking.select(count)
            assert trained(page) == set(chosen.names)
            text = page.locator(".bought").inner_text()
            assert text.startswith(f"{count} of 12 modules ({percent(count / 12)}); ")
            share = percent(chosen.num_parameters / total)
            assert f"; {chosen.num_parameters} parameters ({share}); " in text
            assert f"costs about {ranking.step_time.share(chosen.names):.2f} of" in text
            tied = f"{chosen.num_tied_out} left out with the same score"
            assert (tied in text) == (chosen.num_tied_out > 0)
            marked = page.locator("table.modules tbody tr", has_text="~").locator(".name")
            assert set(marked.all_inner_texts()) == set(undecided(ranking, count))
            assert page.locator(".chosen").all_inner_texts() == [str(count)] * 2


def test_the_heatmap_draws_a_full_cell_for_each_module_that_is_taken(chromium, tmp_path):
    ranking = by_hand()
    with page_of(chromium, report(tmp_path, {"hand": ranking})) as page:
        for count in (1, 5, 11):
            set_budget(page, count)
            labels = page.locator("[data-chart=heatmap] .mark-text.role-mark text")
            page.wait_for_timeout(100)  # Vega draws after the event
            shown = sorted(text for text in labels.all_text_contents() if text != "?")
            ranks = ranking.ranks()
            assert shown == sorted(str(ranks[name]) for name in ranking.select(count).names)
        assert "?" in labels.all_text_contents()


def test_hovering_over_a_cell_shows_the_module(chromium, tmp_path):
    with page_of(chromium, report(tmp_path, {"hand": by_hand()})) as page:
        cells = page.locator("[data-chart=heatmap] .mark-rect.role-mark").last.locator("path")
        cells.nth(4).hover(force=True)
        text = page.locator("#vg-tooltip-element").inner_text()
        assert re.sub(r"\s+", " ", text) == (
            "module model.layers.1.b_proj rank 5 score 0.45 ± standard error 0.04 parameters 40"
        )


def test_the_table_is_sorted_and_filtered_by_keyboard_alone(chromium, tmp_path):
    ranking = by_hand()
    with page_of(chromium, report(tmp_path, {"hand": ranking})) as page:
        assert column(page, 2) == ["1", "2", "2", "2", "5", "6", "7", "8", "9", "10", "11", "?"]
        page.locator("th[data-key=parameters] button").focus()
        page.keyboard.press("Enter")
        sizes = sorted((one.num_parameters for one in ranking.modules), reverse=True)
        assert column(page, 8) == [str(size) for size in sizes]
        head = page.locator("th[data-key=parameters]")
        assert head.get_attribute("aria-sort") == "descending"
        page.keyboard.press("Space")
        assert column(page, 8) == [str(size) for size in reversed(sizes)]
        assert head.get_attribute("aria-sort") == "ascending"
        page.locator("th[data-key=score] button").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        assert column(page, 6)[0] == "-0.2"  # turned round, but what has no score stays last
        assert column(page, 6)[-1] == "not scored"
        page.locator("input.filter").focus()
        page.keyboard.type("LAYERS.1.")
        assert set(column(page, 3)) == {"model.layers.1.a_proj", "model.layers.1.b_proj"}
        assert page.locator(".shown").inner_text() == "2 of 12 shown"
        page.keyboard.press("Tab")
        page.keyboard.press("Space")  # only what is trained: the best 30 % are four
        assert column(page, 3) == ["model.layers.1.a_proj"]


def test_the_slider_moves_by_keyboard_and_the_number_is_held_in_range(chromium, tmp_path):
    with page_of(chromium, report(tmp_path, {"hand": by_hand()}, "--budget", "5")) as page:
        page.locator("input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("input.count").input_value() == "6"
        page.keyboard.press("Home")
        assert page.locator("input.count").input_value() == "1"
        for typed, taken in (("99", "11"), ("0", "1"), ("", "1"), ("3.6", "4")):
            page.locator("input.count").fill(typed)
            page.locator("input.count").press("Enter")
            assert page.locator("input.count").input_value() == taken
            assert page.locator("input[type=range]").input_value() == taken
            assert len(trained(page)) == int(taken)


def test_hostile_names_are_text(chromium, tmp_path):
    ranking = by_hand()
    modules = [
        replace(one, name=f"{text}.{index}", projection=text)
        for index, (one, text) in enumerate(zip(ranking.modules, HOSTILE * 3, strict=False))
    ]
    made_by = {
        "model": {"name": HOSTILE[1]},
        "options": {"model": HOSTILE[1], "data": HOSTILE[0]},
        "note": list(HOSTILE),
    }
    hostile = replace(
        ranking,
        modules=tuple(modules),
        method=HOSTILE[0],
        granularity=HOSTILE[1],
        provenance=made_by,
    )
    names = {"<b onclick=hacked=1>x": hostile, "'\"><i>y": ranking}
    with page_of(chromium, report(tmp_path, {"one": hostile} | names)) as page:
        assert page.title().startswith("keylayers: one, <b onclick=hacked=1>x")
        assert set(column(page, 3)) == {one.name for one in modules}
        for place in range(6):
            page.locator("[data-chart=heatmap] .role-mark path").nth(place).hover(force=True)
        page.locator("input[type=radio]").nth(1).check()
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, b, i").count() == 0
        page.locator("section.ranking:visible summary").click()
        shown = json.loads(page.locator("section.ranking:visible details pre").inner_text())
        assert shown["note"] == list(HOSTILE)


def test_no_other_script_runs_even_if_one_got_in(chromium, tmp_path):
    """The content security policy is the second wall: a script that stands in the file is dead."""
    output = report(tmp_path, {"hand": by_hand()})
    page_text = output.read_text()
    bad = page_text.replace("<main>", "<main><script>window.hacked=1</script>", 1)
    assert bad != page_text
    output.write_text(bad)
    heard = pytest.raises(AssertionError, match="Content Security Policy")
    with heard, page_of(chromium, output) as page:
        assert page.evaluate("window.hacked") is None


def test_several_rankings_are_chosen_by_radio_and_compared(chromium, verified):
    from keylayers.ranking.compare import agreement
    from keylayers.ranking.ranking import Ranking

    rankings = [Ranking.load(verified / name) for name in "ab"]
    pair = agreement(rankings, 0.3)[0]
    with page_of(chromium, verified / "report.html") as page:
        assert page.locator("section.ranking:visible h2").inner_text() == "a"
        assert trained(page) == set(rankings[0].select(0.3).names)
        assert page.locator("[data-chart=curve] svg").is_visible()
        page.locator("input[type=radio]").first.focus()
        page.keyboard.press("ArrowDown")
        assert page.locator("section.ranking:visible h2").inner_text() == "b"
        assert trained(page) == set(rankings[1].select(0.3).names)
        assert "Not verified yet." in page.locator("section.ranking:visible").inner_text()
        cells = page.locator("#agreement tbody td").all_inner_texts()
        assert cells[0] == "a, b"
        assert cells[2].startswith(f"{pair.jaccard:.2f}")
        assert cells[3] == f"{pair.chance_jaccard:.2f}"
        chart = page.locator("[data-chart=agreement] .mark-text.role-mark text")
        text = f"{pair.jaccard:.2f} ({pair.chance_jaccard:.2f})"
        assert chart.all_text_contents() == [text, text]


def test_losses_curve_provenance_and_commands_are_there(chromium, verified):
    with page_of(chromium, verified / "report.html") as page:
        assert page.locator("[data-chart=losses] svg").is_visible()
        legend = page.locator("[data-chart=losses] .role-legend-label text").all_text_contents()
        assert legend == ["stage 1, training", "stage 2, learning the scores"]
        readings = page.locator("section.ranking:visible .reading").inner_text()
        assert "normalised area" in readings
        commands = page.locator("section.ranking:visible .command").all_inner_texts()
        assert commands[0].startswith(f"keylayers train --ranking {verified / 'a'} --budget 6\n")
        assert commands[1].startswith("keylayers rank --model ")
        assert "--method price" in commands[1]


VIEWS = {
    "light": {"viewport": {"width": 1200, "height": 900}},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
}
LUMINANCE = """element => {
  const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  const light = text => { const [r, g, b] = channels(text); return .2126*r + .7152*g + .0722*b; };
  const body = light(getComputedStyle(document.body).backgroundColor);
  const style = getComputedStyle(element);
  const ink = light(element instanceof SVGElement ? style.fill : style.color);
  return (Math.max(ink, body) + .05) / (Math.min(ink, body) + .05);
}"""


@pytest.mark.parametrize("view", VIEWS)
def test_text_is_readable_and_nothing_is_wider_than_the_screen(chromium, verified, view):
    """WCAG AA asks for a contrast of 4.5 for text."""
    with page_of(chromium, verified / "report.html", **VIEWS[view]) as page:
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1]
        texts = page.locator(
            "section.ranking:visible :is(h2, p, .hint, .bought, td, .role-axis-label text, "
            ".role-axis-title text, .role-legend-label text)"
        )
        assert texts.count() > 50
        contrasts = [texts.nth(place).evaluate(LUMINANCE) for place in range(0, texts.count(), 7)]
        assert min(contrasts) >= 4.5
        is_dark = (
            page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        )
        assert is_dark == (view == "dark")


def test_in_print_the_page_is_light_and_has_no_controls(chromium, verified):
    with page_of(chromium, verified / "report.html", color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        label = page.locator("[data-chart=curve] .role-axis-label text").first
        assert label.evaluate(LUMINANCE) >= 4.5
        assert not page.locator("input[type=range]:visible, input.filter:visible").count()
        assert page.locator("section.ranking:visible .bought").is_visible()


def test_without_scripts_the_tables_are_complete(chromium, verified):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((verified / "report.html").as_uri())
    assert (
        page.locator("section.ranking").count() == page.locator("section.ranking:visible").count()
    )
    assert page.locator("table.modules tbody tr:visible").count() == 42
    assert page.locator("noscript").is_visible()
    context.close()
