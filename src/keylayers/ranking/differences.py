# SPDX-License-Identifier: Apache-2.0
"""What sets two rankings apart: the model, the method, the data, the update or the seed.

Told from what their records hold, so that pairs which only repeat a run can be known from others.
Needs no torch.
"""

from collections.abc import Mapping
from typing import Literal, get_args

from keylayers.ranking.ranking import Ranking

Kind = Literal[
    "same data and seed",
    "same data, other seed",
    "other update",
    "other data",
    "other method",
    "other data and method",
    "other model",
    "unknown",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Options of a run by which two updates differ, beside the seed, the model and the data themselves.
OF_DATA = ("max_length", "max_examples", "held_out", "mask_data", "split_seed", "chat_template")
OF_TRAINING = (
    *("objective", "beta", "update", "learning_rate", "batch_size", "gradient_accumulation"),
    *("warmup_steps", "lora_rank", "lora_alpha", "max_steps", "window", "epsilon"),
    *("dtype", "load_in_4bit"),
)


def pair_kind(first: Ranking, second: Ranking) -> Kind:
    """What sets two runs apart, from their provenance: the model, method, data, update or seed.

    Models are told apart by the hash of their weights, or by name where a hash is missing; data by
    the hash of their content; methods by name and granularity; seeds are those of the training and
    of the mask. The update is another one where the options of the training differ, or those of
    the data (its length, its split), or, where it existed before, its hash. "unknown" where a
    record lacks what it takes to tell.
    """
    model = _is_same(first, second, "model", "weights_sha256")
    if model is None:
        model = _is_same(first, second, "model", "name")
    data = _is_same(first, second, "data", "content_sha256")
    seed = _is_same(first, second, "options", "seed")
    method = (first.method, first.granularity) == (second.method, second.granularity)
    if model is False:
        return "other model"
    if model is None or data is None:
        return "unknown"
    if not method:
        return "other method" if data else "other data and method"
    if not data:
        return "other data"
    if seed is None:
        return "unknown"
    if _has_other_update(first, second):
        return "other update"
    is_same = seed and _mask_seed(first) == _mask_seed(second)
    return "same data and seed" if is_same else "same data, other seed"


def _has_other_update(first: Ranking, second: Ranking) -> bool:
    """Whether the two updates differ by more than the seed of their training, as far as known."""
    for part in ("adapter", "tuned"):
        in_both = part in first.provenance and part in second.provenance
        if (part in first.provenance) != (part in second.provenance):
            return True
        if in_both and _is_same(first, second, part, "weights_sha256") is False:
            return True
    options = [one.provenance["options"] for one in (first, second)]
    made = "stage_1" in first.provenance and "stage_1" in second.provenance
    names = (*OF_DATA, *OF_TRAINING) if made else OF_DATA
    return any(options[0].get(name) != options[1].get(name) for name in names)


def _mask_seed(ranking: Ranking) -> object:
    """The seed of the mask's batches; that of the training if none was given."""
    options = ranking.provenance["options"]
    given = options.get("mask_seed")
    return options["seed"] if given is None else given


def _is_same(first: Ranking, second: Ranking, part: str, field: str) -> bool | None:
    """Whether both records hold the same value there; None where one holds none."""
    values = []
    for ranking in (first, second):
        record = ranking.provenance.get(part)
        values.append(record.get(field) if isinstance(record, Mapping) else None)
    return None if None in values else values[0] == values[1]
