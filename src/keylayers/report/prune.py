# SPDX-License-Identifier: Apache-2.0
"""A pruned update compared with the full one: modules, parameters, size, held-out loss."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keylayers.report.terminal import in_nats, plain_table

MIB = 2**20


def pruning_report(found: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows of a pruning.

    Args:
        found: A `PrunedUpdate` as a mapping.
    """
    return Group(pruning_table(found), Text(), Text("\n".join(reading(found))))


def pruning_table(found: Mapping[str, Any]) -> Table:
    """Base model, full and pruned update, one row each, with their mean held-out losses."""
    held_out = f"held-out{in_nats(found['loss_unit']) or ' loss'}"
    table = plain_table("update", "modules", "parameters", "MiB on disk", held_out)
    table.add_row("none (base model)", "0", "0", "", f"{found['base_loss_nats']:.4f}")
    for label, size, loss in (
        (f"full {found['kind']}", found["full"], found["full_loss_nats"]),
        (f"pruned {found['kind']}", found["pruned"], found["pruned_loss_nats"]),
    ):
        table.add_row(
            label,
            f"{size['num_modules']:,}",
            f"{size['num_parameters']:,}",
            f"{size['num_bytes'] / MIB:,.2f}",
            f"{loss:.4f}",
        )
    return table


def reading(found: Mapping[str, Any]) -> list[str]:
    """Whether the pruned update is better or worse than the full one, in sentences."""
    base, full, pruned = (found[f"{name}_loss_nats"] for name in ("base", "full", "pruned"))
    kept, num_modules = len(found["modules"]), found["full"]["num_modules"]
    lines = []
    if kept == num_modules:
        lines.append(f"all {kept} modules are kept: the weights are those of the full one")
    else:
        difference = full - pruned
        on = f"on the {found['num_held_out']} held-out examples"
        if f"{abs(difference):.4f}" == "0.0000":
            lines.append(f"the pruned {found['kind']} is as good as the full one {on}")
        else:
            word = "better" if difference > 0 else "worse"
            lines.append(
                f"the pruned {found['kind']} is {word} than the full one, by {abs(difference):.4f}"
                f"{in_nats(found['loss_unit'])} {on}"
            )
    if full >= base:
        lines.append("the full update does not lower the held-out loss of the base model")
    else:
        share = 100 * (base - pruned) / (base - full)
        lines.append(
            f"with {kept} of {num_modules} modules it keeps {share:.0f} % of what the full one "
            f"lowers the loss by"
        )
    return lines
