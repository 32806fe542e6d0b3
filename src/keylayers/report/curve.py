# SPDX-License-Identifier: Apache-2.0
"""A verification in the terminal: the mask curve, its area and controls, the recommendation."""

from collections.abc import Sequence
from statistics import stdev

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keylayers.ranking.curve import MaskCurve
from keylayers.ranking.verification import Verification
from keylayers.report.terminal import in_nats, plain_table

BAR_WIDTH = 30


def verification_report(found: Verification) -> RenderableType:
    """What the terminal shows of a verification."""
    lines = [area_line(found), *reading(found)]
    title = (
        f"Held-out loss with the updates of only so many modules kept, in {found.made_by.loss_unit}"
    )
    text = Text("\n".join(lines))
    return Group(Text(title, style="bold"), curve_table(found), Text(), text)


def curve_table(found: Verification) -> Table:
    """One row per count: the curve with bars, and the losses of the control orders."""
    titles = ["kept", "best first", "", "random (± sd)", "worst first"]
    if found.leave_one_out:
        titles.append("leave-one-out")
    table = plain_table(*titles, num_left=0)
    curve = found.best_first
    low, high = _range(found)
    means = found.random_means()
    for index, count in enumerate(curve.counts):
        loss = curve.losses[index]
        spread = [order.losses[index] for order in found.random]
        width = f" ± {stdev(spread):.3f}" if len(spread) > 1 else ""
        row: list[RenderableType] = [
            str(count),
            f"{loss:.4f}",
            Bar(high - low, 0, max(0.0, loss - low), width=BAR_WIDTH, color="cyan"),
            f"{means[index]:.4f}{width}",
            f"{found.worst_first.losses[index]:.4f}",
        ]
        if found.leave_one_out:
            row.append(f"{found.leave_one_out.losses[index]:.4f}")
        table.add_row(*row)
    return table


def _range(found: Verification) -> tuple[float, float]:
    """Lowest and highest loss; the lowest is reduced a little so that no bar is empty."""
    losses = [*found.best_first.losses, *found.random_means()]
    low, high = min(losses), max(losses)
    room = (high - low) / BAR_WIDTH
    return (low - room, high) if high > low else (low - 1.0, high)


def area_line(found: Verification) -> str:
    """The normalised areas of the curve and of its controls, or why they are undefined."""
    area = found.best_first.normalised_area
    if area is None:
        reason = "all updates together do not lower the held-out loss"
        return f"normalised area: undefined, because {reason}"
    parts = [f"normalised area (0 is best): {area:.3f}"]
    at_random = found.random_area()
    if at_random is not None:
        spread = f" ± {at_random[1]:.3f}" if len(found.random) > 1 else ""
        parts.append(f"random orders {at_random[0]:.3f}{spread}")
    parts.append(f"worst first {_area(found.worst_first)}")
    if found.leave_one_out:
        parts.append(f"leave-one-out {_area(found.leave_one_out)}")
    return ", ".join(parts)


def _area(curve: MaskCurve) -> str:
    return "undefined" if curve.normalised_area is None else f"{curve.normalised_area:.3f}"


def reading(found: Verification) -> Sequence[str]:
    """Sentences on what the curve says about budgets."""
    curve = found.best_first
    count, loss = curve.best
    lines = [
        f"base {curve.losses[0]:.4f}, all {curve.counts[-1]} modules {curve.losses[-1]:.4f}, best "
        f"point {loss:.4f} with {count} modules"
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
        lines.append("no budget is recommended: the fine-tune as a whole does not help")
        return lines
    lines.append(
        f"recommended budget: {best.num_modules} of {curve.counts[-1]} modules, which lose "
        f"{best.difference_nats:+.4f}{in_nats(found.made_by.loss_unit)} against all"
    )
    lines.append(
        f"  below {best.upper_nats:+.4f} with 95 % confidence over held-out batches; the margin is "
        f"{best.margin_nats:.4f}, {100 * found.margin:g} % of what the fine-tune gained"
    )
    return lines


def _carried(curve: MaskCurve) -> str | None:
    """The share of the fine-tune's gain that the best modules carry; None if it gained nothing."""
    gained = curve.losses[0] - curve.losses[-1]
    if not gained > 0:
        return None
    points = list(zip(curve.counts, curve.losses, strict=True))
    shown = [(count, loss) for count, loss in points[1:] if count <= curve.counts[-1] / 2]
    if not shown:
        return None
    counts = ", ".join(str(count) for count, _ in shown)
    shares = ", ".join(f"{100 * (curve.losses[0] - loss) / gained:.0f} %" for _, loss in shown)
    return f"the best {counts} modules carry {shares} of what all of them gained"
