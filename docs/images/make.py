# SPDX-License-Identifier: Apache-2.0
"""Draw ranking.svg and report.png of a verified ranking: `make.py out/demo/polite`.

And memory.svg of the benchmark of long runs.
"""

import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import altair as alt
from playwright.sync_api import sync_playwright
from rich.console import Console

from keylayers.commands.repeat import how_to_repeat
from keylayers.ranking.ranking import Ranking
from keylayers.report.figures import drawn_chart
from keylayers.report.html import render_report
from keylayers.report.source import load_sources
from keylayers.report.terminal import heatmap

HERE = Path(__file__).resolve().parent
VIEW = {"width": 800, "height": 1000}


def draw_ranking(folder: Path) -> None:
    """What a terminal shows."""
    console = Console(record=True, width=72, file=io.StringIO(), force_terminal=True)
    console.print(heatmap(Ranking.load(folder)))
    drawn = console.export_svg(title="keylayers demo: polite answers, 1 is the most important")
    # rich links a web font; the picture must not call anybody
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    (HERE / "ranking.svg").write_text(drawn, encoding="utf-8")


def draw_report(folder: Path) -> None:
    """A report in a browser, from its slider to the end of the mask curve."""
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        page_file = Path(scratch, "report.html")
        page_file.write_bytes(render_report(load_sources([folder]), 0.3, how_to_repeat))
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=VIEW, color_scheme="light")
        page.goto(page_file.as_uri())
        page.wait_for_selector("html[data-ready]")
        first, last = page.locator(".budget").bounding_box(), page.locator("[data-chart=curve]")
        end = last.bounding_box()
        assert first is not None
        assert end is not None
        clip = {"x": 0.0, "y": first["y"], "width": 800.0}
        clip["height"] = end["y"] + end["height"] - first["y"] + 8
        page.screenshot(path=HERE / "report.png", full_page=True, clip=clip)
        browser.close()


def draw_memory() -> None:
    """Memory of a process over many steps, and of its control."""
    record = HERE.parents[1] / "experiments" / "records" / "long_run.json"
    found = json.loads(record.read_text(encoding="utf-8"))
    rows = [
        {"process": side, "step": number * found["every_steps"], "MiB": mib}
        for side, one in found["sides"].items()
        for number, mib in enumerate(one["mib"], start=1)
    ]
    chart = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line()
        .encode(
            x=alt.X("step:Q"),
            y=alt.Y("MiB:Q", scale=alt.Scale(domainMin=0)),
            color=alt.Color("process:N", scale=alt.Scale(range=["#0072b2", "#d55e00"])),
            strokeDash=alt.StrokeDash("process:N"),
        )
        .properties(width=480, height=200, background="white")
    )
    (HERE / "memory.svg").write_bytes(drawn_chart(chart, ".svg"))


if __name__ == "__main__":
    draw_memory()
    draw_ranking(Path(sys.argv[1]))
    draw_report(Path(sys.argv[1]))
