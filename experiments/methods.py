# SPDX-License-Identifier: Apache-2.0
"""The methods that keylayers has, side by side on the same fine-tunes, by the mask curve.

python experiments/methods.py --demo terse --output record.json
python experiments/methods.py --model MODEL --data DATA --output record.json
"""

from dataclasses import replace

import mask_optimizer

from keylayers.options import MaskOptions
from keylayers.scores import METHODS

SETTINGS = [
    MaskOptions(method="ila"),
    MaskOptions(method="path", path_points=8, mask_batches=2),
    MaskOptions(method="path", path_points=8, mask_batches=8),
]


def score(trainer, updates, setting, seed):
    """The scores of one method."""
    return METHODS[setting.method](trainer, updates, replace(setting, mask_seed=seed), None)


def describe(setting):
    """How a record names a setting."""
    return {
        "method": setting.method,
        "passes": setting.mask_steps if setting.method == "ila" else 8 * setting.mask_batches,
    }


if __name__ == "__main__":
    mask_optimizer.main(mask_optimizer.Study(SETTINGS, score, describe))
