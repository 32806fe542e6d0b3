# SPDX-License-Identifier: Apache-2.0
"""Save a tuned model with tokenizer, record and card."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.environment import is_first_process
from keylayers.files import CARD, RECORD, replaced_folder, write_json, write_text
from keylayers.model.sharding import is_sharded, whole
from keylayers.model.weights import is_added
from keylayers.processes import wait_for_all
from keylayers.updates.adalora import is_adalora


def save_tuned(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Mapping[str, Any],
    card: str,
    json_files: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a PEFT model's adapter, or a whole checkpoint, all or nothing.

    The card replaces the one that PEFT writes. `json_files` maps the names of further files to
    their content. With several processes, the first one writes and the others wait.
    """
    values = _gathered(model) if is_sharded(model) else None
    if not is_first_process():
        wait_for_all()
        return
    with replaced_folder(folder) as temporary:
        with warnings.catch_warnings():
            # AdaLoRA leaves some modules no rank. PEFT mistakes their empty matrices for shards.
            if is_adalora(model):
                warnings.filterwarnings("ignore", message=".* LoRA tensor.* have invalid shape")
            model.save_pretrained(temporary, state_dict=values)
        tokenizer.save_pretrained(temporary)
        for name, content in (json_files or {}).items():
            write_json(temporary / name, content)
        write_text(temporary / CARD, card)
        write_json(temporary / RECORD, record)
    wait_for_all()


def _gathered(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The whole tensors to save, on the CPU of the first process; a collective call."""
    found = {}
    for name, value in model.state_dict().items():
        if is_added(name) or not isinstance(model, PeftModel):
            gathered = whole(value)
            if is_first_process():
                found[name] = gathered.cpu()
    return found
