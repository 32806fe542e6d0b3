# SPDX-License-Identifier: Apache-2.0
"""A page in the Chromium that is installed, headless and without a network."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed; Debian's package is `chromium`"
)


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def page_of(opened, path, **options):
    """The page of a file once it is drawn; afterwards it must have been quiet and alone."""
    context = opened.new_context(offline=True, **options)
    page = context.new_page()
    heard = []
    page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: heard.append(f"request: {request.url}"))
    address = path.resolve().as_uri()
    page.goto(address)
    page.wait_for_selector("html[data-ready]", timeout=30_000)
    page.heard = heard
    try:
        yield page
        assert heard == [f"request: {address}"], heard
    finally:
        context.close()
