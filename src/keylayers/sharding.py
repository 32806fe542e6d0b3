# SPDX-License-Identifier: Apache-2.0
"""Models whose weights FSDP2 spreads over processes, each of which holds a part of every tensor.

A block's weights are whole only while it computes. Gates are put in afterwards, so that they are
not spread: every process has them all. Without FSDP nothing here does anything.
"""

from accelerate.utils import fsdp2_apply_ac, fsdp2_prepare_model
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from keylayers.errors import ConfigError


def shard_as_asked(trainer: Trainer) -> None:
    """Spread the model of a trainer under FSDP2 that computes losses without having trained.

    A trainer that trains does so itself, when it begins.

    Raises:
        ConfigError: it is the first version of FSDP, whose flattened weights no gate can scale.
    """
    if not trainer.is_fsdp_enabled or is_sharded(trainer.model):
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP must be of version 2, got 1, which flattens the weights of a block into one that "
            "no gate can scale; give `fsdp_version: 2` to accelerate"
        )
    if plugin.activation_checkpointing:
        trainer.model = fsdp2_apply_ac(trainer.accelerator, trainer.model)
    trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, trainer.model)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass left whole, so that the model's parameters are the spread ones.

    Without a backward pass FSDP leaves the outermost weights whole until the next one.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Float[Tensor, "..."]:
    """The tensor with the parts of all processes, without its graph; each of them must ask."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def own_part(tensor: Tensor) -> Float[Tensor, "..."]:
    """What this process holds of the tensor, without its graph."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
