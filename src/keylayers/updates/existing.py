# SPDX-License-Identifier: Apache-2.0
"""Load an existing update: an adapter or a second checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.model.loading import Checkpoint, load_adapter
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
    """The model with the update of an adapter or a second checkpoint.

    Args:
        model: The base model; it carries the adapter afterwards.
        options: With `adapter` or `tuned` given.
        progress: Receives a note about weights that are not gated.
        towers: The stacks of blocks in which checkpoints are compared.
    """
    if options.adapter is not None:
        return _from_adapter(model, options.adapter, progress)
    assert options.tuned is not None
    return _from_checkpoint(model, options.tuned, progress, towers)


def _from_adapter(model: PreTrainedModel, adapter: str, progress: Progress) -> TunedModel:
    tuned = load_adapter(model, adapter)
    outside = always_on(tuned)
    if outside:
        progress.note(f"not ranked, always on: the adapter's own {', '.join(outside)}")
    record = {"name": adapter, "weights_sha256": adapter_sha256(tuned), "always_on": outside}
    return TunedModel(tuned, adapter_updates(tuned), {"adapter": record})


def _from_checkpoint(
    model: PreTrainedModel, tuned: str, progress: Progress, towers: Towers
) -> TunedModel:
    checkpoint = Checkpoint.open(ModelOptions(model=tuned))
    updates = dense_updates(model, checkpoint, towers)
    others = take_other_weights(model, checkpoint, towers)
    if others:
        progress.note(
            f"not ranked, taken from the tuned checkpoint: {len(others)} other weights that differ "
            f"({', '.join(others[:2])}{', ...' if len(others) > 2 else ''})"
        )
    record = {
        "name": tuned,
        "weights_sha256": tensors_sha256(
            (name, checkpoint[name]) for name, _ in model.named_parameters()
        ),
        "other_weights_that_differ": others,
    }
    return TunedModel(model, updates, {"tuned": record})
