# SPDX-License-Identifier: Apache-2.0
"""What can be chosen: the values of options that are words, and what each goes with."""

from typing import Literal

Granularity = Literal["module", "block", "projection"]
MaskOptimizer = Literal["sgd", "adam"]
Method = Literal[
    "elimination",
    "path",
    "price",
    "ila",
    "leave-one-out",
    "shapley",
    "update-norm",
    "gradient-norm",
    "fisher",
    "aletheia",
    "adalora",
    "lora-drop",
    "eva",
    "plop",
    "spectrum",
    "kappatune",
    "block-influence",
    "cka",
    "first",
    "last",
    "middle",
    "random",
]
_LEARNED = ("granularity", "mask_steps", "mask_optimizer", "mask_learning_rate", "until_stable")
# The options that have an effect, beside `mask_seed`; the others must be left out.
METHOD_OPTIONS: dict[Method, tuple[str, ...]] = {
    "elimination": ("granularity", "mask_batches", "keep_fraction", "until_stable"),
    "path": ("granularity", "mask_batches", "path_points", "until_stable"),
    "price": (*_LEARNED, "price"),
    "ila": (*_LEARNED, "initial_score"),
    "leave-one-out": ("granularity", "mask_batches"),
    "shapley": ("granularity", "mask_batches", "permutations"),
    "update-norm": (),
    "gradient-norm": ("mask_batches",),
    "fisher": ("mask_batches",),
    "aletheia": ("mask_batches",),
    "adalora": ("mask_steps",),
    "lora-drop": ("mask_batches",),
    "eva": ("mask_batches",),
    "plop": ("mask_batches",),
    "spectrum": (),
    "kappatune": (),
    "block-influence": ("mask_batches",),
    "cka": ("mask_batches",),
    "first": (),
    "last": (),
    "middle": (),
    "random": (),
}
