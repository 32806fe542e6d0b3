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
TIME_TO_LOSS = HERE.parent / "experiments" / "records" / "time_to_loss.json"
UPPER = "30%, the uppermost"
MOST_MODULES = "0.9x-time"  # the price whose selections come nearest to all modules


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
    cases, starts = load("train_selection")["sizes"]["26 M"]["cases"], load("start_up")["seconds"]
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
        _goal("memory budget: held at the peak, of what was foreseen, most", most_held(), 1.03),
        equal_loss(),
        _goal("equal held-out loss: kept for backward, of LoRA on all (30 %, spread)",
              cases["30%, spread"]["kept_ratio"], 0.6),
    ]  # fmt: skip
    return markdown(["what", "goal", "measured", "met"], rows)


def _goal(what: str, found: float, most: float, shown: str | None = None) -> list[str]:
    return [what, f"≤ {most:g}", shown or f"{found:.2f}", "yes" if found <= most else "no"]


def most_held() -> float:
    """The largest part of what was foreseen that a selection really held."""
    cases = load("memory_budget")["cases"]
    return max(one["held"] / one["foreseen"] for case in cases for one in case["budgets"])


def equal_loss() -> list[str]:
    """Throughput until the loss of all modules is reached, at the price that comes nearest."""
    cells = json.loads(TIME_TO_LOSS.read_text(encoding="utf-8"))["cells"]
    found = [cell["results"][MOST_MODULES] for cell in cells]
    ratios = sorted(one["throughput"] for one in found)
    num_reached = sum(one["is_as_low"] for one in found)
    shown = (
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}; reached in "
        f"{num_reached} of {len(found)} runs)"
    )
    is_met = "yes" if statistics.median(ratios) >= 1.5 else "no"
    return ["equal held-out loss: throughput, of LoRA on all modules", "≥ 1.5", shown, is_met]


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
        [title.replace("%", " %"), *_step(row)]
        for title, row in load("train_selection")["sizes"]["26 M"]["cases"].items()
    ]
    return markdown(["trained", *STEP_TITLES], rows)


def sizes() -> str:
    """The same at several sizes."""
    rows = [
        [f"{size}, {found['tokens']}", title.replace("%", " %"), *_step(row)]
        for size, found in load("train_selection")["sizes"].items()
        for title, row in found["cases"].items()
        if title in ("10%, the uppermost", UPPER, "30%, spread")
    ]
    return markdown(["parameters, tokens", "trained", *STEP_TITLES], rows)


STEP_TITLES = ("time (quartiles)", "counted", "kept for backward", "optimiser state", "peak memory")


def _step(row: Mapping[str, Any]) -> list[str]:
    parts = ("counted", "kept_ratio", "optimizer_ratio", "peak_ratio")
    return [time_ratio(row), *(f"{row[part]:.2f}" for part in parts)]


def memory_budget() -> str:
    """What selections within a memory budget were foreseen to hold, and held."""
    rows = []
    for case in load("memory_budget")["cases"]:
        ratios = [one["foreseen"] / one["held"] for one in case["budgets"]]
        used = [one["held"] / one["budget"] for one in case["budgets"]]
        rows.append(
            [
                "LoRA" if case["update"] == "lora" else "full",
                "yes" if case["checkpointed"] else "no",
                f"{case['vocabulary']:,}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                f"{min(used):.2f} to {max(used):.2f}",
            ]
        )
    titles = ["update", "checkpointing", "vocabulary", "foreseen / held", "held / budget"]
    return markdown(titles, rows)


def time_to_loss() -> str:
    """Steps and time that a price needs to reach the held-out loss of all modules."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in json.loads(TIME_TO_LOSS.read_text(encoding="utf-8"))["cells"]:
        data = cell["cell"].rsplit("-", 1)[0]
        whole = cell["results"]["all"]
        for price, one in cell["results"].items():
            if price != "all":
                step = whole["seconds"] / whole["num_steps"] * one["num_steps"] / one["seconds"]
                found.setdefault((data, price), []).append({**one, "step": step})
    rows = []
    for (data, price), cells in sorted(found.items()):
        steps = [one["num_steps"] / one["steps_of_reference"] for one in cells]
        blocks = sorted({one["num_frozen_blocks"] for one in cells})
        ratios = [one["throughput"] for one in cells]
        rows.append(
            [
                data,
                price,
                f"{blocks[0]}" if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}",
                f"{statistics.mean(one['step'] for one in cells):.2f}",
                f"{sum(one['is_as_low'] for one in cells)} of {len(cells)}",
                f"{min(steps):.1f} to {max(steps):.1f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            ]
        )
    titles = ["data", "budget", "frozen blocks of 8", "throughput of a step", "reached",
              "steps needed", "throughput until then, median (range)"]  # fmt: skip
    return markdown(titles, rows)


def growth() -> str:
    """Exponents of time and kept memory."""
    rows = []
    for axis, found in load("growth")["axes"].items():
        span = f"{axis}, {found['values'][0]} to {found['values'][-1]}"
        for name, row in found["modes"].items():
            rows.append([span, name, f"{row['seconds_slope']:.2f}", f"{row['kept_mib_slope']:.2f}"])
    return markdown(["along", "step", "time", "kept for backward"], rows)


def long_run() -> str:
    """Memory of a process over many steps."""
    found = load("long_run")
    rows = []
    for side, one in found["sides"].items():
        first, last = one["mib"][0], one["mib"][-1]
        grown = f"{one['grown_mib_per_1000_steps']:+.2f}"
        rows.append([f"{found['num_steps']:,} {side}", f"{first:.0f}", f"{last:.0f}", grown])
    at_first = f"MiB after {found['every_steps']} steps"
    return markdown(["process", at_first, "at the end", "MiB per 1,000 steps, settled"], rows)


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
    sizes,
    memory_budget,
    prices,
    time_to_loss,
    growth,
    long_run,
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
