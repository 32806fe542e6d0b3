# SPDX-License-Identifier: Apache-2.0
"""Orders of rank-one parts by singular values alone: what other tools cut a LoRA by.

They need no data, so a ranking of parts must be better than these.
"""

from collections.abc import Sequence

import torch

from keylayers.gates import part_sizes
from keylayers.updates import Update


def orders_by_singular_values(updates: Sequence[Update]) -> dict[str, list[str]]:
    """Name of the rule -> all parts, best first.

    `uniform rank`: the same rank in every module (mergekit's extraction, PEFT's and kohya's
    resizing to a rank). `singular value`: the largest of all modules. `energy per parameter`: its
    square by the part's size. `share of energy` and `ratio to the largest`: the rank at which a
    module keeps a share of its squared norm, or drops values below a ratio (kohya's `sv_fro` and
    `sv_ratio`).
    """
    values, index, share, ratio = [], [], [], []
    for update in updates:
        own = update.parts().singular_values.double().cpu()
        energy = own.square() / own.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
        values.append(own)
        index.append(torch.arange(len(own)) - 0.5 * energy)  # ties go to the dominant part
        share.append(energy.cumsum(0) - energy)  # what the parts before it keep
        ratio.append(own / own.max().clamp(min=torch.finfo(torch.float64).tiny))
    sizes = part_sizes(updates)
    names, costs = list(sizes), torch.tensor([*sizes.values()])
    keys = {
        "uniform rank": torch.cat(index),
        "singular value": -torch.cat(values),
        "energy per parameter": -torch.cat(values).square() / costs,
        "share of energy": torch.cat(share),
        "ratio to the largest": -torch.cat(ratio),
    }
    return {
        rule: [names[place] for place in key.argsort(stable=True).tolist()]
        for rule, key in keys.items()
    }
