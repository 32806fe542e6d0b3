# SPDX-License-Identifier: Apache-2.0
"""Draw the pictures of README and docs: `make.py [out/demo/terse]`.

memory.svg and real.svg come from records, report.png from a verified ranking, if one is given.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import altair as alt
from playwright.sync_api import sync_playwright

from keylayers.commands.repeat import how_to_repeat
from keylayers.model.modules import ModuleInfo
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.report.figures import drawn_chart
from keylayers.report.html import render_report
from keylayers.report.notebook import ranking_table
from keylayers.report.source import load_sources

HERE = Path(__file__).resolve().parent
ON, OFF = alt.value(1), alt.value(0.25)  # of what is selected, and of the rest
VIEW = {"width": 800, "height": 1000}


def draw_real() -> None:
    """The ranking of the real model in the README, from its record."""
    record = HERE.parents[1] / "experiments" / "records" / "real.json"
    found = json.loads(record.read_text(encoding="utf-8"))["rankings"]["trec-0"]
    infos = [ModuleInfo(**module) for module in found["modules"]]
    scores = found["methods"]["elimination"]["scores"]
    ranking = Ranking(tuple(map(RankedModule.of, infos, scores)), "elimination")
    table = ranking_table(ranking, 0.3).astype({"block": int})
    across = alt.Chart(table).encode(
        x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("projection:N", sort=list(ranking.projections), title=None),
    )
    # Cividis: readable for colour-blind people and in grey
    colour = alt.Color("rank:Q", scale=alt.Scale(scheme="cividis", reverse=True), legend=None)
    cells = across.mark_rect().encode(
        color=colour, opacity=alt.condition("datum.selected", ON, OFF)
    )
    numbers = across.mark_text(fontSize=9).transform_filter("datum.selected").encode(text="rank:Q")
    chart = alt.layer(cells, numbers).properties(width=760, height=150, background="white")
    (HERE / "real.svg").write_bytes(drawn_chart(chart, ".svg"))


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
    draw_real()
    if len(sys.argv) > 1:
        draw_report(Path(sys.argv[1]))
