# SPDX-License-Identifier: Apache-2.0
"""What sets two rankings apart: the model, the method, the data, the update or the seed.

It is read from their records, so that pairs which only repeat a run can be told from others. Needs
no torch.
"""

from typing import Literal, get_args

from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy, UpdateSource

Difference = Literal[
    "same data and seed",
    "same data, other seed",
    "other update",
    "other data",
    "other method",
    "other data and method",
    "other model",
    "unknown",
]
DIFFERENCES: tuple[Difference, ...] = get_args(Difference)
# Options by which two updates differ, apart from the seed, the model and the data themselves.
OF_DATA = ("max_length", "max_examples", "held_out", "mask_data", "split_seed", "chat_template")
OF_TRAINING = (
    *("objective", "beta", "update", "learning_rate", "batch_size", "gradient_accumulation"),
    *("warmup_steps", "lora_rank", "lora_alpha", "max_steps", "window", "epsilon"),
    *("dtype", "load_in_4bit"),
)


def difference(first: Ranking, second: Ranking) -> Difference:
    """What sets two runs apart; "unknown" where a record lacks what it takes to tell.

    Models are compared by the hash of their weights, or by name if there is none, and data by the
    hash of their content. Seeds are those of the training and the mask. Updates are compared by the
    options of training and data, and updates that existed before the run by their hash.
    """
    own, other = first.made_by, second.made_by
    is_same_model = are_same(own.model.weights_sha256, other.model.weights_sha256)
    if is_same_model is None:
        is_same_model = are_same(own.model.name, other.model.name)
    is_same_data = are_same(own.data.content_sha256, other.data.content_sha256)
    if is_same_model is False:
        return "other model"
    if is_same_model is None or is_same_data is None:
        return "unknown"
    if (first.method, first.granularity) != (second.method, second.granularity):
        return "other method" if is_same_data else "other data and method"
    if not is_same_data:
        return "other data"
    if None in (own.options.seed, other.options.seed):
        return "unknown"
    if _have_other_updates(own, other):
        return "other update"
    return "same data and seed" if _seeds(own) == _seeds(other) else "same data, other seed"


def _have_other_updates(own: MadeBy, other: MadeBy) -> bool:
    """Whether the two updates differ by more than the seed of their training, as far as known."""
    if _are_other(own.adapter, other.adapter) or _are_other(own.tuned, other.tuned):
        return True
    are_trained = own.stage_1 is not None and other.stage_1 is not None
    names = (*OF_DATA, *OF_TRAINING) if are_trained else OF_DATA
    options, others = own.options.given, other.options.given
    return any(options.get(name) != others.get(name) for name in names)


def _are_other(own: UpdateSource | None, other: UpdateSource | None) -> bool:
    """Whether only one update existed before, or both did and have other weights."""
    if own is None or other is None:
        return own is not other
    return are_same(own.weights_sha256, other.weights_sha256) is False


def _seeds(made_by: MadeBy) -> tuple[int | None, int | None]:
    """The seeds of the training and of the mask's batches, which default to the former."""
    seed, mask_seed = made_by.options.seed, made_by.options.mask_seed
    return seed, seed if mask_seed is None else mask_seed


def are_same(own: object, other: object) -> bool | None:
    """Whether two values are equal; None where one is not known."""
    return None if own is None or other is None else own == other
