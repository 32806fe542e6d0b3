# SPDX-License-Identifier: Apache-2.0
"""The documentation site: its checks find what they look for, and its pages say what is true.

`make docs` builds it and runs the checks on it.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "site"))
import check  # noqa: E402
import messages  # noqa: E402

SITE = ROOT / "build" / "site"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
LOOKS = {
    "light": {"color_scheme": "light"},
    "phone, dark": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
}
GOOD = '<h2 id="there">x</h2><a href="other.html#part">x</a> <a href="#there">x</a>'
# What a page holds -> the end of the line about it
PROBLEMS = {
    '<a href="lost.html">x</a>': "links to lost.html, which does not exist",
    '<a href="other.html#lost">x</a>': "links to other.html#lost, which has no such anchor",
    '<a href="#lost">x</a>': "links to #lost, which has no such anchor",
    '<img src="lost.png">': "loads lost.png, which does not exist",
    '<script src="https://example.org/a.js"></script>': "loads https://example.org/a.js",
    '<script src="//example.org/a.js"></script>': "loads //example.org/a.js",
    '<link rel="preconnect" href="https://example.org">': "loads https://example.org",
    '<img srcset="other.html 1x, https://example.org/2.png 2x">': "loads https://example.org/2.png",
    "<style>@import 'https://example.org/a.css'</style>": "loads https://example.org/a.css",
    '<p style="background: url(https://example.org/a.png)">': "loads https://example.org/a.png",
}
SOURCE = """
def raises(name):
    raise ConfigError("as it stands")
    raise DataError(f"with {name!r}{name} and " f"more")
    text = "by a name"
    raise ModelError(text)
    raise ModelError(name)
    raise ValueError("of somebody else")
"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="part">x</h1>')
    return tmp_path


@pytest.mark.parametrize(("html", "problem"), PROBLEMS.items(), ids=PROBLEMS.values())
def test_a_dead_link_or_a_request_to_another_host_is_found(site, html, problem):
    (site / "page.html").write_text(GOOD + html)
    assert check.problems(site) == [f"page.html: {problem}"]


def test_a_style_sheet_that_loads_a_font_from_another_host_is_found(site):
    (site / "page.html").write_text(GOOD + '<a href="https://example.org">only a link</a>')
    assert check.problems(site) == []
    (site / "a.css").write_text("@font-face { src: url(https://example.org/font.woff2) }")
    assert check.problems(site) == ["a.css: loads https://example.org/font.woff2"]


def test_messages_are_found_with_what_a_run_fills_in_left_open(tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "SOURCE", tmp_path)
    (tmp_path / "file.py").write_text(SOURCE)
    found = [(message.error, message.text) for message in messages.messages()]
    assert found == [
        ("ConfigError", "as it stands"),
        ("DataError", "with … and more"),
        ("ModelError", "by a name"),
    ]


def test_troubleshooting_quotes_beginnings_of_messages_that_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"`` ?(.+?) ?``", text)
    beginnings = [message.text for message in messages.messages()]
    assert len(quoted) > 20
    unknown = [one for one in quoted if not any(text.startswith(one) for text in beginnings)]
    assert unknown == []


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built; run `make docs`")
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_every_page_opens_from_disk_without_a_network(look):
    """Nothing but files of the site is asked for, nothing is complained of, nothing sticks out."""
    from playwright.sync_api import sync_playwright

    pages = sorted(SITE.glob("*.html"))
    pages.remove(SITE / "404.html")  # a server's page, with addresses from its root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_context(offline=True, **look).new_page()
        heard = []
        for event in ("console", "pageerror"):
            page.on(event, lambda what, event=event: heard.append(f"{event}: {what}"))
        page.on("request", lambda request: heard.append(request.url))
        for path in pages:
            page.goto(path.as_uri())
            assert page.locator("h1").is_visible()
            width = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert width <= 0, path.name
        browser.close()
    inside = f"{SITE.as_uri()}/"
    assert len(pages) > 30
    assert [what for what in heard if not what.startswith(inside)] == []


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built; run `make docs`")
def test_search_works_from_disk():
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_context(offline=True).new_page()
        page.goto((SITE / "index.html").as_uri())
        page.get_by_role("button", name="Search").click()
        page.keyboard.type("mask curve")
        expect(page.locator("a[href*='/measured.html?h=mask']").first).to_be_visible()
        browser.close()
