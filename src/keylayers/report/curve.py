# SPDX-License-Identifier: Apache-2.0
"""A verification in the terminal: the mask curve, its area and controls, the recommendation."""

import math
from collections.abc import Sequence
from statistics import stdev

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keylayers.ranking.verification import MaskCurve, Verification
from keylayers.report.terminal import in_nats, plain_table

BAR_WIDTH = 30
BEST_RIVAL = "best by singular values"


def verification_report(found: Verification) -> RenderableType:
    """What the terminal shows of a verification."""
    unit = found.made_by.loss_unit
    what = "number of modules that keep their update"
    if found.best_first.num_parameters:
        what = "parameters of the rank-one parts that are kept"
    title = f"Held-out loss by the {what}, in {unit}"
    text = Text("\n".join(reading(found)))
    return Group(Text(title, style="bold"), _curve_table(found), Text(), text)


def _curve_table(found: Verification) -> Table:
    """One row per count: the curve with bars, and the losses of the control orders."""
    others: dict[str, Sequence[float]] = {}
    if found.leave_one_out:
        others["leave-one-out"] = found.leave_one_out.losses
    if found.rivals:
        others[BEST_RIVAL] = found.best_of_rivals()
    titles = ["kept", "best first", "", "random (± sd)", "worst first", *others]
    table = plain_table(*titles, num_left=0)
    sizes = found.best_first.num_parameters
    means, spreads = found.random_means(), random_spreads(found)
    shown = [*found.best_first.losses, *means]
    low, high = min(shown), max(shown)
    # Bars start a little below the lowest loss, so that none is empty.
    low = low - (high - low) / BAR_WIDTH if high > low else low - 1.0
    for index, count in enumerate(found.best_first.counts):
        loss = found.best_first.losses[index]
        spread = f" ± {spreads[index]:.3f}" if len(found.random) > 1 else ""
        table.add_row(
            f"{sizes[index] / sizes[-1]:.1%}" if sizes else str(count),
            f"{loss:.4f}",
            Bar(high - low, 0, max(0.0, loss - low), width=BAR_WIDTH, color="cyan"),
            f"{means[index]:.4f}{spread}",
            f"{found.worst_first.losses[index]:.4f}",
            *(f"{losses[index]:.4f}" for losses in others.values()),
        )
    return table


def random_spreads(found: Verification) -> list[float]:
    """Standard deviation of the losses of the random orders, for each count; 0 for one order."""
    by_count = zip(*(order.losses for order in found.random), strict=True)
    return [stdev(losses) if len(losses) > 1 else 0.0 for losses in by_count]


def reading(found: Verification) -> list[str]:
    """Sentences on the area of the curve and on what it says about budgets."""
    curve = found.best_first
    count, loss = curve.best
    what = "parts" if curve.num_parameters else "modules"
    lines = [
        _area_line(found),
        f"base {curve.losses[0]:.4f}, all {curve.counts[-1]} {what} {curve.losses[-1]:.4f}, best "
        f"point {loss:.4f} with {count} {what}",
    ]
    if found.is_overfit:
        lines += [
            "some updates hurt: with fewer of them the held-out loss is lower than with all",
            "  so the area says little; look at the best point, and train for fewer steps",
        ]
    if carried := _carried(curve):
        lines.append(carried)
    best = found.recommendation
    if best is None:
        return [*lines, "no budget is recommended: the fine-tune as a whole does not help"]
    return [
        *lines,
        f"recommended budget: {best.num_modules} of {curve.counts[-1]} {what}, which lose "
        f"{best.difference_nats:+.4f}{in_nats(found.made_by.loss_unit)} against all",
        f"  below {best.upper_nats:+.4f} with 95 % confidence over held-out batches; the margin is "
        f"{best.margin_nats:.4f}, {100 * found.margin:g} % of what the fine-tune gained",
    ]


def _area_line(found: Verification) -> str:
    """The normalised areas of the curve and of its controls, or why they are undefined."""
    area = found.best_first.normalised_area
    if area is None:
        reason = "because all updates together do not lower the held-out loss"
        return f"normalised area: undefined, {reason}"
    parts = [f"normalised area (0 is best): {area:.3f}"]
    at_random = found.random_area()
    if at_random is not None:
        spread = f" ± {at_random[1]:.3f}" if len(found.random) > 1 else ""
        parts.append(f"random orders {at_random[0]:.3f}{spread}")
    others = {"worst first": found.worst_first, "leave-one-out": found.leave_one_out}
    others |= found.rivals
    for name, curve in others.items():
        if curve is not None:
            area = curve.normalised_area
            parts.append(f"{name} {'undefined' if area is None else f'{area:.3f}'}")
    return ", ".join(parts)


def _carried(curve: MaskCurve) -> str | None:
    """The share of the fine-tune's gain that the best modules carry; None if it gained nothing."""
    gained = curve.reduction_nats
    points = list(zip(curve.counts, curve.losses, strict=True))[1:]
    shown = [(count, loss) for count, loss in points if count <= curve.counts[-1] / 2]
    if not gained > 0 or not shown:
        return None
    shares = [f"{100 * (curve.losses[0] - loss) / gained:.0f} %" for _, loss in shown]
    if curve.num_parameters:
        sizes = [f"{100 * size / curve.num_parameters[-1]:.0f} %" for size in curve.num_parameters]
        return (
            f"the best {', '.join(sizes[1 : len(shown) + 1 : 3])} of the parameters carry "
            f"{', '.join(shares[::3])} of what all of them gained"
        )
    counts = ", ".join(str(count) for count, _ in shown)
    return f"the best {counts} modules carry {', '.join(shares)} of what all of them gained"


def carried_near(found: Verification, num_parameters: int) -> str | None:
    """What the measured point nearest to this size carries; None if nothing was gained."""
    curve = found.best_first
    if not curve.reduction_nats > 0:
        return None
    points = list(zip(curve.num_parameters, curve.losses, strict=True))[1:]
    size, loss = min(points, key=lambda point: abs(math.log(point[0] / num_parameters)))
    share = 100 * (curve.losses[0] - loss) / curve.reduction_nats
    whole = curve.num_parameters[-1]
    return f"measured: {100 * size / whole:.3g} % of the adapter carry {share:.1f} % of the gain"
