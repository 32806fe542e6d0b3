# SPDX-License-Identifier: Apache-2.0
"""Models sharded by FSDP2: every process holds a part of each weight.

A block's weights are whole only while it computes. Gates are added after sharding, so that every
process holds all of them. Without FSDP these functions do nothing.
"""

from accelerate.utils import fsdp2_prepare_model
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer

from keylayers.environment import wrapper
from keylayers.errors import ConfigError


def place_model(trainer: Trainer) -> None:
    """Shard or move a trainer's model, so that it can compute losses before training.

    Only FSDP2 and DeepSpeed wait with this until training starts.
    """
    _check_wrapper(trainer)
    if trainer.is_deepspeed_enabled:
        trainer.model.to(trainer.args.device)
    if not trainer.is_fsdp_enabled or is_sharded(trainer.model):
        return
    trainer.model = trainer.model_wrapped = fsdp2_prepare_model(trainer.accelerator, trainer.model)


def _check_wrapper(trainer: Trainer) -> None:
    """Refuse a wrapper under which weights cannot be read or scaled."""
    asked = wrapper()
    enabled = {"FSDP": trainer.is_fsdp_enabled, "DEEPSPEED": trainer.is_deepspeed_enabled}
    if asked is not None and not enabled[asked]:
        raise ConfigError(
            f"{asked} needs accelerators, but accelerate ignores it on CPUs; start without it: DDP "
            f"with as many processes gives the same result"
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
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO must be stage 0, 1 or 2, got 3, which splits weights so that no gate "
            "can scale them; use FSDP2, or `keylayers export` a selection to train it with another "
            "tool"
        )


def check_can_freeze_inside(trainer: Trainer) -> None:
    """Refuse DeepSpeed's optimiser, which updates weights that have no gradient."""
    _check_wrapper(trainer)
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "frozen modules must not change, but DeepSpeed's optimiser holds all weights as one "
            "and keeps moving them; use DDP or FSDP2, or rank first and train with DeepSpeed on "
            "that ranking"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Free the root's weights, which FSDP2 keeps gathered after a forward pass without backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Shaped[Tensor, "..."]:
    """The whole tensor, detached; a collective call that every process must make."""
    found = tensor.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found


def own_part(tensor: Tensor) -> Shaped[Tensor, "..."]:
    """The part of the tensor that this process holds, detached."""
    found = tensor.detach()
    return found.to_local() if isinstance(found, DTensor) else found
