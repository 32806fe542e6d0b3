# SPDX-License-Identifier: Apache-2.0
"""Models whose weights FSDP2 spreads over processes, each of which holds a part of every tensor.

A block's weights are whole only while it computes. Gates are put in afterwards, so that they are
not spread: every process has them all. Without FSDP nothing here does anything.
"""

from accelerate.utils import fsdp2_prepare_model
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from keylayers.environment import wrapper
from keylayers.errors import ConfigError

ZERO_PARAMETERS = 3  # the stage of DeepSpeed's ZeRO that spreads the weights themselves


def place_model(trainer: Trainer) -> None:
    """Bring a trainer's model to where its wrapper wants it, so that it gives losses untrained.

    Under FSDP2 it is spread over the processes, under DeepSpeed moved to the accelerator. Otherwise
    the trainer does so itself when it begins to train.

    Raises:
        ConfigError: the wrapper is one under which weights cannot be scaled, or the launcher asked
            for one that does not work on this device.
    """
    check_wrapper(trainer)
    if trainer.is_deepspeed_enabled:
        trainer.model.to(trainer.args.device)
    if not trainer.is_fsdp_enabled or is_sharded(trainer.model):
        return
    trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, trainer.model)


def check_wrapper(trainer: Trainer) -> None:
    """Refuse a trainer whose wrapper keeps weights where they cannot be read or scaled.

    Raises:
        ConfigError: says which wrappers can be used.
    """
    asked = wrapper()
    enabled = {"FSDP": trainer.is_fsdp_enabled, "DEEPSPEED": trainer.is_deepspeed_enabled}
    if asked is not None and not enabled[asked]:
        raise ConfigError(
            f"{asked} must have accelerators to spread a model over, but accelerate leaves it out "
            f"on CPUs; start without it: the same processes under DDP give the same"
        )
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ConfigError(
                "FSDP must be of version 2, got 1, which flattens the weights of a block into one "
                "that no gate can scale; give `fsdp_version: 2` to accelerate"
            )
        if plugin.activation_checkpointing:
            raise ConfigError(
                "`fsdp_activation_checkpointing` must be false, got true, which renames modules; "
                "turn checkpointing on by `--gradient-checkpointing` (in a script: "
                "`gradient_checkpointing=True`) instead"
            )
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        if stage == ZERO_PARAMETERS:
            raise ConfigError(
                f"DeepSpeed's ZeRO must be of stage 0 to 2, got {stage}, which takes weights apart "
                f"where no gate can scale them; use FSDP2, which spreads them too, or `keylayers "
                f"export` a selection to train it with another tool"
            )


def check_can_freeze_inside(trainer: Trainer) -> None:
    """Refuse a trainer whose optimiser moves weights that no longer have a gradient.

    Raises:
        ConfigError: it is DeepSpeed's, which holds all weights as one.
    """
    check_wrapper(trainer)
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "modules must stay as they are once they are frozen, but DeepSpeed's optimiser holds "
            "all weights as one and moves them on; use DDP or FSDP2, or rank first and train with "
            "DeepSpeed on that ranking"
        )


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


def whole(tensor: Tensor) -> Shaped[Tensor, "..."]:
    """The tensor with the parts of all processes, without its graph; each of them must ask."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def own_part(tensor: Tensor) -> Shaped[Tensor, "..."]:
    """What this process holds of the tensor, without its graph."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
