# SPDX-License-Identifier: Apache-2.0
"""A tuned model on disk: an ordinary adapter or checkpoint, its tokenizer and its record."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.records import RECORD, replaced_folder, write_json
from keylayers.updates.adalora import is_adalora


def save_tuned(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Mapping[str, Any],
) -> None:
    """Write a PEFT model's adapter, or a whole checkpoint, all or nothing.

    Raises:
        OutputError: the folder cannot be written, or holds what keylayers did not make.
    """
    with replaced_folder(folder) as temporary:
        with warnings.catch_warnings():
            # modules that AdaLoRA leaves no rank are empty, which PEFT takes for lost shards
            if is_adalora(model):
                warnings.filterwarnings("ignore", message=".* LoRA tensor.* have invalid shape")
            model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD, record)
