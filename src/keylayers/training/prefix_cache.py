# SPDX-License-Identifier: Apache-2.0
"""Compute the frozen blocks below the lowest trained module once, and read the result later.

These blocks have no update, so an example leaves them with the same hidden states in every epoch.
The first time an example is seen they are written to one file, by the example's tokens; a batch
whose examples are all there skips the blocks. Losses are the same up to rounding, since the same
example was then computed beside others.

The file has a fixed size, taken when training begins, and no name: whatever ends the process gives
the room back. The first batch that is read is computed too, and compared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from keylayers.apply.adapter import trainable_modules
from keylayers.errors import ConfigError, GuardError, ModelError
from keylayers.model.modules import base_model_of, blocks_of, map_modules
from keylayers.ranges import check_above_zero
from keylayers.training.hidden_states import (
    Example,
    HiddenStates,
    examples_of,
    relative_error,
)
from keylayers.updates.adapter import towers_of

HIGHEST_ERROR = 0.05  # relative, where a low precision would allow more
EPSILONS = 64  # relative error that rounding may leave, in units of the dtype's own


class PrefixCache(TrainerCallback):
    """Skips the frozen blocks below the lowest trained module for examples seen before.

    For any transformers or TRL trainer of a selection, in one process.

    Args:
        max_gib: Size of the file, GiB of disk. Examples beyond it are computed each time.
        folder: Where it lies, on a disk with that much room. Not given: where temporary files go.

    Attributes:
        num_blocks: Blocks that are skipped.
        num_read: Batches that skipped them so far.
        num_computed: Batches that did not.
    """

    def __init__(self, max_gib: float, folder: Path | None = None) -> None:
        check_above_zero("prefix_cache_gib", max_gib)
        self.max_gib = max_gib
        self.folder = folder
        self.num_blocks = self.num_read = self.num_computed = 0
        self._is_checked = False
        self._store: HiddenStates | None = None
        self._rows: list[Example] | None = None
        self._found: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the room, and go between the blocks.

        Raises:
            ConfigError: there is no frozen block, or dropout or noise makes each epoch another.
            ModelError: the blocks are not one stack that hands one tensor on.
        """
        assert model is not None
        self.close()
        blocks = frozen_prefix(model)
        _refuse_unfit(model, args)
        width = int(_settings(model)["hidden_size"])
        self._store = HiddenStates(self.max_gib, self.folder, width)
        self.num_blocks = len(blocks)
        decoder = _owner(model, blocks[0])
        handle: RemovableHandle = decoder.register_forward_pre_hook(self._see, with_kwargs=True)
        self._undo.append(handle.remove)
        for place, block in enumerate(blocks):
            self._wrap(block, is_first=place == 0, is_last=place == len(blocks) - 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give room and blocks back."""
        self.close()

    def close(self) -> None:
        """The same, after a training that failed; nothing if it has been done."""
        while self._undo:
            self._undo.pop()()
        self._store = self._rows = self._found = None

    def _see(self, decoder: nn.Module, _: Any, named: dict[str, Any]) -> None:
        """Look up the examples of a batch that is about to go through the blocks."""
        self._rows = self._found = None
        ids = named.get("input_ids")
        if not decoder.training or ids is None or named.get("past_key_values") is not None:
            return
        self._rows = examples_of(ids, named.get("attention_mask"), named.get("position_ids"))
        assert self._store is not None
        self._found = self._store.read(self._rows, ids)
        self.num_read += self._found is not None
        self.num_computed += self._found is None

    def _wrap(self, block: nn.Module, *, is_first: bool, is_last: bool) -> None:
        forward, own = block.forward, vars(block).get("forward")  # accelerate sets one too

        def read_or_compute(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._found is not None and self._is_checked:
                return self._found.to(hidden_states.dtype) if is_first else hidden_states
            # nothing below is trained, and what is computed once must not be computed anew
            hidden = forward(hidden_states.detach(), *args, **kwargs)
            if not isinstance(hidden, Tensor):
                raise ModelError(
                    f"blocks must hand on one tensor to be skipped, but those of this model give "
                    f"a {type(hidden).__name__}; leave `prefix_cache_gib` out"
                )
            if is_last:
                self._keep_or_check(hidden)
            return hidden

        block.forward = read_or_compute
        self._undo.append(lambda: _restore(block, own))

    def _keep_or_check(self, hidden: Float[Tensor, "batch token d_model"]) -> None:
        if self._rows is None or self._store is None:
            return
        if self._found is None:
            self._store.write(self._rows, hidden.detach())
            return
        error = relative_error(self._found, hidden.detach(), self._rows)
        allowed = min(EPSILONS * torch.finfo(hidden.dtype).eps, HIGHEST_ERROR)
        if not error <= allowed:
            raise GuardError(
                f"what the frozen blocks compute must be the same in every epoch, but it differs "
                f"by {error:.2g} of its size where rounding explains {allowed:.2g}; leave "
                f"`prefix_cache_gib` out"
            )
        self._is_checked = True


def _settings(model: nn.Module) -> dict[str, Any]:
    base = base_model_of(model)
    assert isinstance(base, PreTrainedModel)
    found: dict[str, Any] = base.config.get_text_config().to_dict()
    return found


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        del vars(block)["forward"]
    else:
        block.forward = forward


def frozen_prefix(model: nn.Module) -> list[nn.Module]:
    """The blocks below the lowest one that holds a trained parameter.

    Raises:
        ConfigError: there is none, or what lies before the blocks is trained.
        ModelError: the model has several stacks of blocks.
    """
    towers = towers_of(model)
    blocks = blocks_of(model, towers)
    owners = {_owner(model, block) for block in blocks}
    if len(owners) > 1:
        raise ModelError(
            f"`prefix_cache_gib` needs one stack of blocks, but the model has {len(owners)}"
        )
    trained = trainable_modules(model)
    inside = {info.name: info.block_index for info in map_modules(model, towers)}
    places = [inside.get(name) for name in trained]
    lowest = min((0 if place is None else place for place in places), default=0)
    if lowest == 0:
        raise ConfigError(
            "`prefix_cache_gib` needs frozen blocks below the lowest trained module, but block 0 "
            "or what lies before it is trained; leave it out, or choose a budget that stops "
            "higher, such as 0.7x-time"
        )
    return blocks[:lowest]


def _refuse_unfit(model: nn.Module, args: TrainingArguments) -> None:
    """Dropout and noise make each epoch another; some checkpointing needs the frozen blocks."""
    chances = {
        name: value
        for name, value in _settings(model).items()
        if ("drop" in name or "noise" in name) and isinstance(value, float) and value > 0
    }
    if getattr(args, "neftune_noise_alpha", None):
        chances["neftune_noise_alpha"] = args.neftune_noise_alpha
    checkpointing = getattr(args, "activation_checkpointing_kwargs", None) or {}
    if args.activation_checkpointing and checkpointing.get("use_reentrant"):
        raise ConfigError(
            "`prefix_cache_gib` must be left out with gradient checkpointing of the kind that "
            "needs gradients of inputs (use_reentrant); set use_reentrant to False"
        )
    if chances:
        name, value = next(iter(chances.items()))
        raise ConfigError(
            f"`prefix_cache_gib` needs frozen blocks that compute the same in every epoch, but "
            f"{name} is {value}; set it to 0 or leave the cache out"
        )


def _owner(model: nn.Module, block: nn.Module) -> nn.Module:
    """The module that holds the list with `block`."""
    for module in base_model_of(model).modules():
        lists = (one for one in module.children() if isinstance(one, nn.ModuleList))
        if any(block in list(one) for one in lists):
            return module
    raise AssertionError("blocks lie in a list")
