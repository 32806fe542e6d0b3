# SPDX-License-Identifier: Apache-2.0
"""The reference model of a preference loss must not contain the update that is ranked.

TRL 1.16 copies the adapter of a trainer's model to a second one, "ref", as the reference
(https://github.com/huggingface/trl/pull/4723). If the adapter is trained afterwards, that is the
start of training. If it was finished, the loss would compare the update with itself: we hide "ref",
so that TRL disables the adapter for the reference pass and uses the base model.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.model.preserve import restored

REFERENCE_ADAPTER = "ref"  # TRL's name for it


@contextlib.contextmanager
def without_own_copy(trainer: Trainer) -> Iterator[None]:
    """Inside the block, use the base model as the reference if "ref" equals the update."""
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    own = {id(parameter) for parameter in model.parameters()}  # PEFT adds adapters in place
    if isinstance(reference, nn.Module) and any(id(p) in own for p in reference.parameters()):
        raise ConfigError(
            "`ref_model` must be another copy of the model, but it shares weights and adapter with "
            "the model that is ranked; load a second copy, or leave it out"
        )
    if not _is_own_copy(model):
        yield
        return
    if getattr(trainer, "precompute_ref_logps", False):
        raise ConfigError(
            "the reference must be what training started from, but its log probabilities were "
            "computed with the finished adapter; build the trainer with "
            "`precompute_ref_log_probs=False`, or give it a `ref_model`"
        )
    with restored([model.peft_config]):
        del model.peft_config[REFERENCE_ADAPTER]
        yield


def reference_of(trainer: Trainer) -> str | None:
    """The reference model's name in a record; None if the loss has no reference."""
    if not hasattr(trainer, "ref_model") or getattr(trainer, "beta", None) == 0.0:
        return None
    if trainer.ref_model is not None:
        return "ref_model"
    model = trainer.model
    has_adapter = isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config
    return f"adapter {REFERENCE_ADAPTER}" if has_adapter and not _is_own_copy(model) else "base"


def _is_own_copy(model: nn.Module) -> bool:
    """Whether the model has a reference adapter with the same weights as the active one."""
    if not isinstance(model, PeftModel) or REFERENCE_ADAPTER not in model.peft_config:
        return False
    active = model.active_adapter
    if active == REFERENCE_ADAPTER:
        return False
    tensors = dict(model.named_parameters(remove_duplicate=False))
    own = [name for name in tensors if f".{active}." in name]
    copies = [tensors.get(name.replace(f".{active}.", f".{REFERENCE_ADAPTER}.")) for name in own]
    both = zip(own, copies, strict=True)
    return all(copy is not None and torch.equal(tensors[name], copy) for name, copy in both)
