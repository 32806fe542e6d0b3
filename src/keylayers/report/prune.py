# SPDX-License-Identifier: Apache-2.0
"""A pruned update compared with the full one: modules, parameters, size, held-out loss."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keylayers.ranking.record import Pruned
from keylayers.report.terminal import held_out_title, in_nats, plain_table

MIB = 2**20


def pruning_report(found: Pruned) -> RenderableType:
    """What the terminal shows of a pruning."""
    return Group(_table(found), Text(), Text("\n".join(reading(found))))


def _table(found: Pruned) -> Table:
    """Base model, full and pruned update, one row each, with their mean held-out losses."""
    title = held_out_title(found.loss_unit)
    table = plain_table("update", "modules", "parameters", "MiB on disk", title)
    table.add_row("none (base model)", "0", "0", "", f"{found.base_loss_nats:.4f}")
    full, pruned = (found.full, found.full_loss_nats), (found.pruned, found.pruned_loss_nats)
    for label, (size, loss) in (("full", full), ("pruned", pruned)):
        counts = f"{size.num_modules:,}", f"{size.num_parameters:,}"
        table.add_row(
            f"{label} {found.kind}", *counts, f"{size.num_bytes / MIB:,.2f}", f"{loss:.4f}"
        )
    if found.healed_loss_nats is not None:
        table.add_row("the same, trained again", "", "", "", f"{found.healed_loss_nats:.4f}")
    return table


def reading(found: Pruned) -> list[str]:
    """Whether the pruned update is better or worse than the full one, in sentences."""
    base, full, pruned = found.base_loss_nats, found.full_loss_nats, found.pruned_loss_nats
    kept, num_modules = len(found.modules), found.full.num_modules
    on = f"on the {found.num_held_out} held-out examples"
    difference = f"{abs(full - pruned):.4f}"
    if kept == num_modules and found.pruned.num_parts == found.full.num_parts:
        line = f"all {kept} modules are kept: the weights are those of the full one"
    elif difference == "0.0000":
        line = f"the pruned {found.kind} is as good as the full one {on}"
    else:
        line = (
            f"the pruned {found.kind} is {'better' if full > pruned else 'worse'} than the full "
            f"one, by {difference}{in_nats(found.loss_unit)} {on}"
        )
    if full >= base:
        return [line, "the full update does not lower the held-out loss of the base model"]
    share = (base - pruned) / (base - full)
    kept_share = f"{kept} of {num_modules} modules it keeps {share:.0%}"
    if found.full.num_parts is not None:
        size = found.pruned.num_parameters / found.full.num_parameters
        kept_share = (
            f"{found.pruned.num_parts} of {found.full.num_parts} rank-one parts ({size:.1%} of the "
            f"parameters) it keeps {share:.1%}"
        )
    return [line, f"with {kept_share.replace('%', ' %')} of what the full one lowers the loss by"]
