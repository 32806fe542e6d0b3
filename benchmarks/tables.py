# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md, from the records beside this file.

python -m benchmarks.tables       # writes them into the page; a test compares them
"""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
RETRAINING = HERE.parent / "experiments" / "records" / "retraining.json"
RANKINGS = HERE.parent / "experiments" / "records" / "rankings.json"
UPPER = "30%, the uppermost"


def load(name: str) -> Any:
    """A record."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def time_ratio(row: Mapping[str, Any], digits: int = 2) -> str:
    """Median and quartiles."""
    low, high = (f"{one:.{digits}f}" for one in row["time_ratio_quartiles"])
    return f"{row['time_ratio_median']:.{digits}f} ({low} to {high})"


def goals() -> str:
    """Every goal, what was measured, and whether it is met."""
    step, pair, growth = load("mask_step")["modes"], load("checkpoint_pair"), load("growth")["axes"]
    ours, free = step["gates on A (keylayers)"], load("free_score")
    cases, starts = load("train_selection")["cases"], load("start_up")["seconds"]
    wait = {title: statistics.median(found) for title, found in starts.items()}
    late = wait["keylayers rank, to its first step"] - wait["plain TRL, to its first step"]
    slopes = {
        axis: max(one["seconds_slope"] for one in growth[axis]["modes"].values())
        for axis in ("blocks", "batch")
    }
    tokens = growth["tokens"]["modes"]
    beyond = max(
        tokens[name]["seconds_slope"] - tokens["bare pass"]["seconds_slope"]
        for name in ("training step", "mask step")
    )
    upper = cases[f"{UPPER}, checkpointed, keylayers"]
    as_trl = cases[f"{UPPER}, checkpointed, as TRL has it"]
    faster = as_trl["time_ratio_median"] / upper["time_ratio_median"]
    quick = max(wait["keylayers --help"], wait["keylayers show"])
    rows = [
        _goal("mask step: time, of the limit", ours["time_ratio_median"], 1.15, time_ratio(ours)),
        _goal("mask step: kept for backward, of the limit", ours["kept_ratio"], 1.02),
        _goal("free score: a step with it, of one without", free["time_ratio_median"], 1.02,
              time_ratio(free, 3)),
        _goal("two checkpoints: memory beyond a bare pass, in largest modules",
              pair["extra_in_largest_modules"], 1.0),
        _goal("growth of time with blocks: exponent", slopes["blocks"], 1.05),
        _goal("growth of time with batch: exponent", slopes["batch"], 1.05),
        _goal("growth of time with the sequence: exponent beyond a bare pass's", beyond, 0.1),
        _goal("`--help` and `show`: seconds, the slower", quick, 0.5),
        _goal("`rank` to its first step: seconds after plain TRL", late, 2.0),
        _goal("uppermost 30 % with checkpointing: time, of TRL's own way", 1 / faster, 1.0),
        ["equal held-out loss: throughput, of LoRA on all modules", "≥ 1.5", "not reached", "no"],
    ]  # fmt: skip
    return markdown(["what", "goal", "measured", "met"], rows)


def _goal(what: str, found: float, most: float, shown: str | None = None) -> list[str]:
    return [what, f"≤ {most:g}", shown or f"{found:.2f}", "yes" if found <= most else "no"]


def mask_step() -> str:
    """The mask step against its limit."""
    rows = [
        [name, time_ratio(row), f"{row['kept_mib']:.0f}", f"{row['kept_ratio']:.2f}"]
        for name, row in load("mask_step")["modes"].items()
    ]
    titles = ["step", "time, ratio to the limit (quartiles)", "kept for backward, MiB", "ratio"]
    return markdown(titles, rows)


def checkpoint_pair() -> str:
    """Memory of ranking two checkpoints, against a bare pass."""
    record = load("checkpoint_pair")
    bare, own = (record["peak_mib"][side] for side in ("bare", "rank"))
    largest = record["largest_module_mib"]
    rows = [
        [title, f"{statistics.median(found):,.0f}", f"{min(found):,.0f} to {max(found):,.0f}"]
        for title, found in (("bare forward and backward pass", bare), ("ranking", own))
    ]
    extra = statistics.median(own) - statistics.median(bare)
    rows.append(["difference", f"{extra:,.0f}", f"{extra / largest:.2f} of the largest module"])
    rows.append(["largest module", f"{largest:,.0f}", ""])
    rows.append(["a second model would be", f"{record['checkpoint_mib']:,.0f}", ""])
    return markdown(["held at most after loading, MiB", "median", "range"], rows)


def train_selection() -> str:
    """A training step of a selection against LoRA on all modules."""
    rows = [
        [
            title.replace("%", " %"),
            time_ratio(row),
            f"{row['counted']:.2f}",
            f"{row['kept_ratio']:.2f}",
            f"{row['optimizer_ratio']:.2f}",
        ]
        for title, row in load("train_selection")["cases"].items()
    ]
    titles = ["trained", "time (quartiles)", "counted", "kept for backward", "optimiser state"]
    return markdown(titles, rows)


def growth() -> str:
    """Exponents of time and kept memory."""
    rows = []
    for axis, found in load("growth")["axes"].items():
        span = f"{axis}, {found['values'][0]} to {found['values'][-1]}"
        for name, row in found["modes"].items():
            rows.append([span, name, f"{row['seconds_slope']:.2f}", f"{row['kept_mib_slope']:.2f}"])
    return markdown(["along", "step", "time", "kept for backward"], rows)


def start_up() -> str:
    """Seconds that people wait."""
    rows = [
        [title, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
        for title, found in load("start_up")["seconds"].items()
    ]
    return markdown(["process", "seconds, median", "range"], rows)


def quality() -> str:
    """Each method's passes and seconds to its mean area; those on the Pareto front are marked."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell in json.loads(RANKINGS.read_text(encoding="utf-8"))["cells"]:
        for one in cell["results"]:
            if "forward_equivalents" in one and cell["cell"]["data"] != "user-long":
                own = found.setdefault((one["method"], one["mask_data"] or ""), {})
                for what in ("area", "forward_equivalents", "seconds"):
                    own.setdefault(what, []).append(one.get(what, 0.0))
    best: dict[str, tuple[float, float, float]] = {}
    for (method, _), own in found.items():
        area, passes, seconds = (statistics.mean(values) for values in own.values())
        if method not in best or area < best[method][0]:
            best[method] = (area, passes, seconds)
    rows, lowest = [], float("inf")
    by_cost = sorted(best.items(), key=lambda one: (one[1][1], one[1][0]))
    for method, (area, passes, seconds) in by_cost:
        is_ahead = area < lowest
        lowest = min(lowest, area)
        numbers = [f"{passes:.0f}", f"{seconds:.1f}", f"{area:.3f}"]
        rows.append([method, *numbers, "yes" if is_ahead else ""])
    return markdown(["method", "passes", "seconds", "mean area", "on the front"], rows)


def prices() -> str:
    """Held-out loss of what a price buys, trained from scratch, minus that of all modules."""
    data = {"terse": "built-in model, terse answers", "alpaca": "2 M model, Alpaca-GPT4"}
    losses: dict[tuple[str, float], list[float]] = {}
    for cell in json.loads(RETRAINING.read_text(encoding="utf-8"))["cells"]:
        found = {(one["label"], one["budget"]): one for one in cell["results"]}
        whole = found["all", 1.0]["held_out_loss_nats"]
        for (label, price), one in found.items():
            if label == "elimination within a price":
                name = cell["cell"].rsplit("-", 1)[0]
                losses.setdefault((name, price), []).append(one["held_out_loss_nats"] - whole)
    rows = []
    for price in sorted({price for _, price in losses}):
        cells = []
        for name in data:
            values = losses[name, price]
            spread = statistics.stdev(values)
            cells.append(f"{statistics.mean(values):+.3f} ± {spread:.3f}")
        rows.append([f"{price:g}x-time", f"{1 / price:.2f}", *cells])
    return markdown(["budget", "counted throughput", *data.values()], rows)


TABLES: Sequence[Callable[[], str]] = (
    goals,
    mask_step,
    quality,
    train_selection,
    prices,
    growth,
    start_up,
    checkpoint_pair,
)


def page() -> str:
    """The page with every table made anew, between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for make in TABLES:
        name = make.__name__
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda match, make=make: match[1] + make() + match[2], text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
