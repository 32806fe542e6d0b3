# SPDX-License-Identifier: Apache-2.0
"""The methods that keylayers has, side by side on the same fine-tunes, by the mask curve.

python experiments/methods.py --demo terse --output record.json
python experiments/methods.py --model MODEL --data DATA --output record.json
"""

from dataclasses import replace

import mask_optimizer

from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options

SETTINGS = [
    scoring_options(method="ila"),
    scoring_options(method="path", path_points=8, mask_batches=2),
    scoring_options(method="path", path_points=8, mask_batches=8),
]


def score(trainer, updates, setting, seed):
    """The scores of one method."""
    return score_modules(trainer, updates, replace(setting, mask_seed=seed))


def describe(setting):
    """How a record names a setting."""
    own = setting.options
    return {
        "method": setting.method,
        "passes": own.mask_steps if setting.method == "ila" else 8 * own.mask_batches,
    }


if __name__ == "__main__":
    mask_optimizer.main(mask_optimizer.Study(SETTINGS, score, describe))
