# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md, from the records of `benchmarks/`."""

import statistics
from functools import partial

import tables
from findings import retrained
from tables import ROOT, markdown

load = partial(tables.load, folder=ROOT / "benchmarks")
UPPER = "30%, the uppermost"
STEP_TITLES = ("time (quartiles)", "counted", "kept", "optimizer", "peak")


def shown(row, digits=2):
    """Median and quartiles of a ratio."""
    low, high = (f"{quartile:.{digits}f}" for quartile in row["time_ratio_quartiles"])
    return f"{row['time_ratio_median']:.{digits}f} ({low} to {high})"


def goals():
    """Every goal, what was measured, and whether it is met."""
    step, free = load("mask_step")["modes"]["gates on A (keylayers)"], load("free_score")
    pair, growth = load("checkpoint_pair"), load("growth")["axes"]
    cases = load("train_selection")["sizes"]["26 M"]["cases"]
    wait = {title: statistics.median(found) for title, found in load("start_up")["seconds"].items()}
    late = wait["keylayers rank, to its first step"] - wait["plain TRL, to its first step"]
    tokens = growth["tokens"]["modes"]
    steepest = max(tokens[name]["seconds_slope"] for name in ("training step", "mask step"))
    upper = cases[f"{UPPER}, checkpointed, keylayers"]["time_ratio_median"]
    as_trl = cases[f"{UPPER}, checkpointed, as TRL has it"]["time_ratio_median"]

    def slope(axis):
        return max(mode["seconds_slope"] for mode in growth[axis]["modes"].values())

    rows = [
        _goal("mask step: time, of the limit", step["time_ratio_median"], 1.15, shown(step)),
        _goal("mask step: kept for backward, of the limit", step["kept_ratio"], 1.02),
        _goal("training step with scores (`StepScores`), of one without",
              free["time_ratio_median"], 1.02, shown(free, 3)),
        _goal("two checkpoints: memory beyond a bare pass, in largest modules",
              pair["extra_in_largest_modules"], 1.0),
        _goal("growth of time with blocks: exponent", slope("blocks"), 1.05),
        _goal("growth of time with batch size: exponent", slope("batch"), 1.05),
        _goal("growth of time with sequence length: exponent beyond a bare pass",
              steepest - tokens["bare pass"]["seconds_slope"], 0.1),
        _goal("`--help` and `show`: seconds, the slower",
              max(wait["keylayers --help"], wait["keylayers show"]), 0.5),
        _goal("`rank` to its first step: seconds after plain TRL", late, 2.0),
        _goal("uppermost 30 % with checkpointing: time, of TRL's way", upper / as_trl, 1.0),
        _goal("30 % spread over all blocks: kept for backward, of LoRA on all",
              cases["30%, spread"]["kept_ratio"], 0.6),
    ]  # fmt: skip
    return markdown(["what", "goal", "measured", "met"], rows)


def _goal(what, found, most, text=None):
    return [what, f"≤ {most:g}", text or f"{found:.2f}", "yes" if found <= most else "no"]


def mask_step():
    """The mask step against its limit."""
    rows = [
        [name, shown(row), f"{row['kept_mib']:.0f}", f"{row['kept_ratio']:.2f}"]
        for name, row in load("mask_step")["modes"].items()
    ]
    return markdown(["step", "time (quartiles)", "kept for backward, MiB", "ratio"], rows)


def train_selection():
    """A training step of a selection against LoRA on all modules."""
    cases = load("train_selection")["sizes"]["26 M"]["cases"]
    rows = [[title.replace("%", " %"), *_step(row)] for title, row in cases.items()]
    return markdown(["trained", *STEP_TITLES], rows)


def sizes():
    """Training steps of selections at other sizes."""
    rows = [
        [f"{size}, {found['tokens']}", title.replace("%", " %"), *_step(row)]
        for size, found in load("train_selection")["sizes"].items()
        for title, row in found["cases"].items()
        if title in (UPPER, "30%, spread") and size != "26 M"
    ]
    return markdown(["parameters, tokens", "trained", *STEP_TITLES], rows)


def _step(row):
    parts = ("counted", "kept_ratio", "optimizer_ratio", "peak_ratio")
    return [shown(row), *(f"{row[part]:.2f}" for part in parts)]


def growth():
    """Exponents of time and kept memory."""
    rows = [
        [f"{axis}, {found['values'][0]} to {found['values'][-1]}", name,
         f"{row['seconds_slope']:.2f}", f"{row['kept_mib_slope']:.2f}"]
        for axis, found in load("growth")["axes"].items()
        for name, row in found["modes"].items()
    ]  # fmt: skip
    return markdown(["along", "step", "time", "kept for backward"], rows)


def start_up():
    """Seconds that you wait."""
    rows = [
        [title, f"{statistics.median(found):.2f}", f"{min(found):.2f} to {max(found):.2f}"]
        for title, found in load("start_up")["seconds"].items()
    ]
    return markdown(["process", "seconds, median", "range"], rows)


def checkpoint_pair():
    """Memory of ranking two checkpoints, against a bare pass."""
    record = load("checkpoint_pair")
    bare, own = (statistics.median(record["peak_mib"][side]) for side in ("bare", "rank"))
    largest = record["largest_module_mib"]
    rows = [
        ["bare forward and backward pass", f"{bare:,.0f}"],
        ["ranking", f"{own:,.0f}"],
        ["difference", f"{own - bare:,.0f} ({(own - bare) / largest:.2f} of the largest module)"],
        ["a second model would be", f"{record['checkpoint_mib']:,.0f}"],
    ]
    return markdown(["held after loading at most", "MiB, median"], rows)


def prices():
    """Held-out loss of what a time budget buys, trained from scratch, minus that of all modules."""
    data = {"terse": "built-in model, terse answers", "alpaca": "2 M model, Alpaca-GPT4"}
    losses = [retrained(name)["held_out_loss_nats"] for name in data]
    bought = "elimination within a price "
    rows = []
    for name in sorted(name for name in losses[0] if name.startswith(bought)):
        price = float(name.removeprefix(bought))
        differences = [table[name] - table["all 1"] for table in losses]
        cells = (f"{found.mean():+.3f} ± {found.std():.3f}" for found in differences)
        rows.append([f"{price:g}x-time", f"{1 / price:.2f}", *cells])
    return markdown(["budget", "counted throughput", *data.values()], rows)


TABLES = (goals, mask_step, train_selection, sizes, prices, growth, start_up, checkpoint_pair)
