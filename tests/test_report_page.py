# SPDX-License-Identifier: Apache-2.0
"""The HTML report in a real browser: what it shows is what the ranking and `select()` say.

The browser is the Chromium that is installed, headless and without a network.
"""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest

from commands import keylayers
from keylayers.ranking.certainty import undecided
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking

from rankings import ranking_of, verification_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None, reason="Chromium is not installed; Debian's package is `chromium`"
    ),
]
HOSTILE = (
    "<img src=x onerror=window.hacked=1>",
    "</script><script>window.hacked=1</script>",
    "\"onmouseover='window.hacked=1'",
    "{{ 7 * 7 }} & <!-- ",
    "'); window.hacked=1; //",
)
SCORES = [0.9, 0.5, 0.5, 0.45, 0.5, 0.1, 0.05, -0.2, None, 0.3, 0.0, 0.02]
SECTION = "section.ranking:visible"
ROWS = f"{SECTION} table.modules tbody tr"
SLIDER = f"{SECTION} input[type=range]"


def by_hand():
    """Ties, a module without a score, standard errors on most, and one outside the blocks."""
    sizes = [10 * (index + 1) for index in range(len(SCORES))]
    errors = [None if score is None else 0.04 for score in SCORES]
    errors[1] = None
    ranking = ranking_of(SCORES, num_parameters=sizes, errors=errors)
    first, *others = ranking.modules
    outside = replace(first, name="model.embed_tokens", block_index=None)
    return replace(ranking, modules=(outside, *others))


HAND = by_hand()


@pytest.fixture(scope="module")
def page_of():
    """Opens the page of a file, as a context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield partial(drawn_page, browser)
        browser.close()


@contextmanager
def drawn_page(browser, path, **options):
    """The page of a file once it is drawn; afterwards it must have been quiet and alone."""
    context = browser.new_context(offline=True, **options)
    page = context.new_page()
    heard = []
    for event in ("console", "pageerror", "dialog"):
        page.on(event, lambda what, event=event: heard.append(f"{event}: {what}"))
    page.on("request", lambda request: heard.append(f"request: {request.url}"))
    address = path.resolve().as_uri()
    page.goto(address)
    if options.get("java_script_enabled", True):
        page.wait_for_selector("html[data-ready]", timeout=30_000)
    try:
        yield page
        assert heard == [f"request: {address}"], heard
    finally:
        context.close()


def report(folder, rankings, *more):
    for name, ranking in rankings.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        ranking.save(folder / name / "ranking.json")
    output = folder / "report.html"
    paths = [folder / name for name in rankings]
    assert keylayers("show", *paths, "--html", output, *more) == 0
    return output


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return report(tmp_path_factory.mktemp("hand"), {"hand": HAND})


@pytest.fixture(scope="module")
def verified(ranked, ranked_full, tmp_path_factory):
    """A folder with a report of rankings `a`, which is verified, and `b`."""
    folder = tmp_path_factory.mktemp("verified")
    shutil.copytree(ranked, folder / "a")
    shutil.copytree(ranked_full, folder / "b")
    verification_of(Ranking.load(ranked)).save(folder / "a" / "verification.json")
    assert keylayers("show", folder / "a", folder / "b", "--html", folder / "report.html") == 0
    return folder


def trained(page):
    return set(page.locator(f"{ROWS}.is-trained .name").all_inner_texts())


def column(page, number):
    return page.locator(f"{ROWS}:visible td:nth-child({number})").all_inner_texts()


def percent(share):
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def test_the_slider_shows_what_select_takes_at_every_budget(page_of, hand):
    ranks, total = HAND.ranks(), sum(one.num_parameters for one in HAND.modules)
    with page_of(hand) as page:
        assert page.locator(SLIDER).get_attribute("max") == "11"  # one of the twelve has no score
        for count in range(1, 12):
            page.locator(SLIDER).fill(str(count))
            chosen = HAND.select(count)
            assert trained(page) == set(chosen.names)
            text = page.locator(".bought").inner_text()
            assert text.startswith(f"{count} of 12 modules ({percent(count / 12)}); ")
            share = percent(chosen.num_parameters / total)
            assert f"; {chosen.num_parameters} parameters ({share}); " in text
            assert f"costs about {HAND.step_time.share(chosen.names):.2f} of" in text
            tied = f"{chosen.num_tied_out} left out with the same score"
            assert (tied in text) == (chosen.num_tied_out > 0)
            marked = page.locator(ROWS, has_text="~").locator(".name")
            assert set(marked.all_inner_texts()) == set(undecided(HAND, count))
            assert page.locator(".chosen").all_inner_texts() == [str(count)] * 2
            # a full cell of the heatmap with its rank for each module that is taken
            labels = page.locator("[data-chart=heatmap] .mark-text.role-mark text")
            page.wait_for_timeout(100)  # Vega draws after the event
            shown = sorted(text for text in labels.all_text_contents() if text != "?")
            assert shown == sorted(str(ranks[name]) for name in chosen.names)
        assert "?" in labels.all_text_contents()


def test_the_table_is_sorted_and_filtered_by_keyboard_alone(page_of, hand):
    with page_of(hand) as page:
        assert column(page, 2) == ["1", "2", "2", "2", "5", "6", "7", "8", "9", "10", "11", "?"]
        page.locator("th[data-key=parameters] button").focus()
        sizes = [str(size) for size in sorted(one.num_parameters for one in HAND.modules)]
        head = page.locator("th[data-key=parameters]")
        for key, order in (("Enter", "descending"), ("Space", "ascending")):
            page.keyboard.press(key)
            assert column(page, 8) == sizes[:: 1 if order == "ascending" else -1]
            assert head.get_attribute("aria-sort") == order
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


def test_the_slider_moves_by_keyboard_and_the_number_is_held_in_range(page_of, tmp_path):
    with page_of(report(tmp_path, {"hand": HAND}, "--budget", "5")) as page:
        number = page.locator("input.count")
        page.locator(SLIDER).focus()
        for key, count in (("ArrowRight", "6"), ("Home", "1")):
            page.keyboard.press(key)
            assert number.input_value() == count
        for typed, taken in (("99", "11"), ("0", "1"), ("", "1"), ("3.6", "4")):
            number.fill(typed)
            number.press("Enter")
            assert number.input_value() == page.locator(SLIDER).input_value() == taken
            assert len(trained(page)) == int(taken)


def test_hostile_names_are_text(page_of, tmp_path):
    modules = tuple(
        replace(one, name=f"{text}.{index}", projection=text)
        for index, (one, text) in enumerate(zip(HAND.modules, HOSTILE * 3, strict=False))
    )
    options = {"model": HOSTILE[1], "data": HOSTILE[0]}
    made_by = {"model": {"name": HOSTILE[1]}, "options": options, "note": list(HOSTILE)}
    hostile = replace(
        HAND, modules=modules, method=HOSTILE[0], granularity=HOSTILE[1], provenance=made_by
    )
    names = {"one": hostile, "<b onclick=hacked=1>x": hostile, "'\"><i>y": HAND}
    with page_of(report(tmp_path, names)) as page:
        assert page.title().startswith("keylayers: one, <b onclick=hacked=1>x")
        assert set(column(page, 3)) == {one.name for one in modules}
        for place in range(6):
            page.locator("[data-chart=heatmap] .role-mark path").nth(place).hover(force=True)
        page.locator("input[type=radio]").nth(1).check()
        assert page.evaluate("window.hacked") is None
        assert page.locator("img, b, i").count() == 0
        page.locator(f"{SECTION} summary").click()
        shown = json.loads(page.locator(f"{SECTION} details pre").inner_text())
        assert shown["note"] == list(HOSTILE)


def test_no_other_script_runs_even_if_one_got_in(page_of, hand, tmp_path):
    """The content security policy is the second wall: a script that stands in the file is dead."""
    bad = hand.read_text().replace("<main>", "<main><script>window.hacked=1</script>", 1)
    assert "hacked" in bad
    (tmp_path / "bad.html").write_text(bad)
    heard = pytest.raises(AssertionError, match="Content Security Policy")
    with heard, page_of(tmp_path / "bad.html") as page:
        assert page.evaluate("window.hacked") is None


def test_a_verified_ranking_is_shown_whole_and_another_is_chosen_by_radio(page_of, verified):
    rankings = [Ranking.load(verified / name) for name in "ab"]
    with page_of(verified / "report.html") as page:
        assert page.locator(f"{SECTION} h2").inner_text() == "a"
        assert trained(page) == set(rankings[0].select(0.3).names)
        for chart in ("curve", "losses"):
            assert page.locator(f"{SECTION} [data-chart={chart}] svg").is_visible()
        assert "normalised area" in page.locator(f"{SECTION} .reading").inner_text()
        use, again = page.locator(f"{SECTION} .command").all_inner_texts()
        assert use.startswith(f"keylayers train --ranking {verified / 'a'} --budget 6\n")
        assert again.startswith("keylayers rank --model ")
        assert "--lora-rank 4" in again
        page.locator("input[type=radio]").first.focus()
        page.keyboard.press("ArrowDown")
        assert page.locator(f"{SECTION} h2").inner_text() == "b"
        assert trained(page) == set(rankings[1].select(0.3).names)
        assert "Not verified yet." in page.locator(SECTION).inner_text()
        pair = agreement(rankings, 0.3)[0]
        cells = page.locator("#agreement tbody td").all_inner_texts()
        assert cells[0] == "a, b"
        assert cells[2].startswith(f"{pair.jaccard:.2f}")
        assert cells[3] == f"{pair.chance_jaccard:.2f}"
        assert page.locator("[data-chart=agreement] svg").is_visible()


SCREEN = {"width": 1200, "height": 900}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
VIEWS = {
    "light": {"viewport": SCREEN},
    "dark": {"viewport": SCREEN, "color_scheme": "dark"},
    "print": {"viewport": SCREEN, "color_scheme": "dark"},
    "phone": PHONE,
}
TEXTS = (
    "h2, p, .hint, .bought, td, .role-axis-label text, .role-axis-title text, "
    ".role-legend-label text"
)
CONTRAST = """element => {
  const channels = text => text.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255)
    .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  const light = text => { const [r, g, b] = channels(text); return .2126*r + .7152*g + .0722*b; };
  const body = light(getComputedStyle(document.body).backgroundColor);
  const style = getComputedStyle(element);
  const ink = light(element instanceof SVGElement ? style.fill : style.color);
  return (Math.max(ink, body) + .05) / (Math.min(ink, body) + .05);
}"""


@pytest.mark.parametrize("view", VIEWS)
def test_text_is_readable_and_fits_and_print_is_light_without_controls(page_of, verified, view):
    """WCAG AA asks for a contrast of 4.5 for text."""
    with page_of(verified / "report.html", **VIEWS[view]) as page:
        page.emulate_media(media="print" if view == "print" else "screen")
        widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert widths[0] <= widths[1]
        texts = page.locator(f"{SECTION} :is({TEXTS})")
        assert texts.count() > 50
        contrasts = [texts.nth(place).evaluate(CONTRAST) for place in range(0, texts.count(), 7)]
        assert min(contrasts) >= 4.5
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background != "rgb(255, 255, 255)") == (view == "dark")
        controls = page.locator("input[type=range]:visible, input.filter:visible")
        assert (controls.count() == 0) == (view == "print")


def test_without_scripts_the_tables_are_complete(page_of, verified):
    with page_of(verified / "report.html", java_script_enabled=False) as page:
        assert page.locator("section.ranking").count() == page.locator(SECTION).count() == 2
        assert page.locator(f"{ROWS}:visible").count() == 42
        assert page.locator("noscript").is_visible()


PARTS = [(8.0, 4.0, 2.0), (90.0, 1.0, 0.0), (6.0, 5.0, 3.0), (0.1, 0.05, 0.01)]
PART_SIZES = [10, 300, 20, 40]


def of_parts():
    whole = ranking_of([sum(scores) for scores in PARTS])
    modules = tuple(
        replace(module, part_scores=scores, part_parameters=(size,) * 3)
        for module, scores, size in zip(whole.modules, PARTS, PART_SIZES, strict=True)
    )
    return replace(whole, modules=modules, granularity="part")


def test_the_slider_of_parts_goes_over_parameters_and_shows_the_ranks_that_are_kept(
    page_of, tmp_path
):
    ranking = of_parts()
    with page_of(report(tmp_path, {"parts": ranking}, "--budget", "0.1x-params")) as page:
        assert page.locator(".command").first.inner_text() == (
            f"keylayers prune --ranking {tmp_path / 'parts'} --budget 0.1x-params"
        )
        last = int(page.locator(SLIDER).get_attribute("max"))
        for position in (0, last // 2, last):
            page.locator(SLIDER).fill(str(position))
            budget = page.locator(".chosen").inner_text()
            chosen = ranking.select(int(budget) if budget.isdigit() else budget)
            shown = dict(zip(column(page, 3), map(int, column(page, 1)), strict=True))
            assert {name: rank for name, rank in shown.items() if rank} == chosen.ranks
            share = percent(chosen.num_parameters / 1110)
            text = page.locator(".bought").inner_text()
            assert f" of 12 parts in {len(chosen.ranks)} of 4 modules; " in text
            assert f"{chosen.num_parameters:,} of 1,110 parameters ({share})" in text
            labels = page.locator("[data-chart=heatmap] .mark-text.role-mark text")
            page.wait_for_timeout(100)  # Vega draws after the event
            assert sorted(map(int, labels.all_text_contents())) == sorted(shown.values())
        assert (position, chosen.num_parameters) == (last, 1110)
        number = page.locator("input.count")
        for typed, taken in (("0", "0.901"), ("100", "100"), ("", "0.901")):  # 10 of 1110
            number.fill(typed)
            number.press("Enter")
            assert number.input_value() == taken
