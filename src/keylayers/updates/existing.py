# SPDX-License-Identifier: Apache-2.0
"""Load an existing update: an adapter or a second checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.model.checkpoint import Checkpoint
from keylayers.model.loading import load_adapter
from keylayers.model.options import ModelOptions, Towers, UpdateOptions
from keylayers.model.weights import adapter_sha256, tensors_sha256
from keylayers.progress import Progress
from keylayers.updates import Update, adapter_updates, dense_updates
from keylayers.updates.adapter import always_on
from keylayers.updates.checkpoints import take_other_weights


@dataclass(frozen=True)
class TunedModel:
    """A model with an update that gates can scale, and a record of where it came from."""

    model: PreTrainedModel | PeftModel
    updates: Sequence[Update]
    record: dict[str, Any]


def existing_update(
    model: PreTrainedModel,
    options: UpdateOptions,
    progress: Progress,
    towers: Towers = "language",
) -> TunedModel:
    """`model` with the adapter, or with the difference to the checkpoint, that `options` name.

    `progress` gets a note about weights that are not gated.
    """
    record: dict[str, Any]
    if options.adapter is not None:
        adapted = load_adapter(model, options.adapter)
        outside = always_on(adapted)
        if outside:
            progress.note(f"not ranked, always on: the adapter's own {', '.join(outside)}")
        record = {"name": options.adapter, "weights_sha256": adapter_sha256(adapted)}
        record["always_on"] = outside
        return TunedModel(adapted, adapter_updates(adapted), {"adapter": record})
    assert options.tuned is not None
    checkpoint = Checkpoint.open(ModelOptions(model=options.tuned))
    updates = dense_updates(model, checkpoint, towers)
    others = take_other_weights(model, checkpoint, towers)
    if others:
        progress.note(
            f"not ranked, taken from the tuned checkpoint: {len(others)} other weights that differ "
            f"({', '.join(others[:2])}{', ...' if len(others) > 2 else ''})"
        )
    names = (name for name, _ in model.named_parameters())
    sha256 = tensors_sha256((name, checkpoint[name]) for name in names)
    record = {"name": options.tuned, "weights_sha256": sha256, "other_weights_that_differ": others}
    return TunedModel(model, updates, {"tuned": record})
