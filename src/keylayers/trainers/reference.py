# SPDX-License-Identifier: Apache-2.0
"""The reference model of a preference loss: the base model, and never the update being ranked.

A TRL trainer that is given a model with an adapter keeps a copy of it, the adapter "ref", as the
reference. Where the adapter is trained afterwards, "ref" is what training started from, and belongs
to the loss. Where a trainer is built around an adapter that is finished, "ref" is the very update
that is to be ranked: the loss would compare it with itself. There the adapter is switched off for
the reference pass, which is what training started from for all that is known.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from keylayers.errors import ConfigError

REFERENCE_ADAPTER = "ref"  # TRL's name for it


@contextlib.contextmanager
def without_own_copy(trainer: Trainer) -> Iterator[None]:
    """Inside the block, let the base model be the reference where "ref" is the update itself.

    Raises:
        ConfigError: the reference is the model that is ranked, or its log probabilities were
            computed with the update.
    """
    model = trainer.model
    _refuse_shared(model, getattr(trainer, "ref_model", None))
    if not _is_own_copy(model):
        yield
        return
    if getattr(trainer, "precompute_ref_logps", False):
        raise ConfigError(
            "the reference must be what training started from, but its log probabilities were "
            "computed with the finished adapter; build the trainer with "
            "`precompute_ref_log_probs=False`, or give it a `ref_model`"
        )
    configs = dict(model.peft_config)
    del model.peft_config[REFERENCE_ADAPTER]
    try:
        yield
    finally:
        model.peft_config.clear()
        model.peft_config.update(configs)  # in the order that they had


def reference_of(trainer: Trainer) -> str | None:
    """What a record says of the reference; None for a loss without one."""
    if not hasattr(trainer, "ref_model") or getattr(trainer, "beta", None) == 0.0:
        return None
    if trainer.ref_model is not None:
        return "ref_model"
    has_copy = isinstance(trainer.model, PeftModel) and (
        REFERENCE_ADAPTER in trainer.model.peft_config
    )
    return (
        f"adapter {REFERENCE_ADAPTER}" if has_copy and not _is_own_copy(trainer.model) else "base"
    )


def _is_own_copy(model: nn.Module) -> bool:
    """Whether the reference adapter is there and equals the active one, value by value."""
    if not isinstance(model, PeftModel) or REFERENCE_ADAPTER not in model.peft_config:
        return False
    active = model.active_adapter
    if active == REFERENCE_ADAPTER:
        return False
    tensors = dict(model.named_parameters(remove_duplicate=False))
    mark = f".{active}."
    pairs = [
        (tensor, tensors.get(name.replace(mark, f".{REFERENCE_ADAPTER}.")))
        for name, tensor in tensors.items()
        if mark in name
    ]
    return all(copy is not None and torch.equal(tensor, copy) for tensor, copy in pairs)


def _refuse_shared(model: nn.Module, reference: object) -> None:
    """PEFT wraps a model in place: the base model object carries the adapter too."""
    if not isinstance(reference, nn.Module):
        return
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in reference.parameters()):
        raise ConfigError(
            "`ref_model` must be another copy of the model, but it shares weights with the model "
            "that is ranked, whose adapter it carries too; load it once more, or leave it out"
        )
