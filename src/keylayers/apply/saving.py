# SPDX-License-Identifier: Apache-2.0
"""A tuned model on disk: an ordinary adapter or checkpoint, its tokenizer and its record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.records import RECORD, replaced_folder, write_json


def save_tuned(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a PEFT model's adapter, or a whole checkpoint, all or nothing.

    Args:
        model: What was tuned.
        tokenizer: Its tokenizer.
        folder: New, or an earlier result of keylayers.
        record: How it came about.
        beside: Names and contents of further JSON files.

    Raises:
        OutputError: the folder cannot be written, or holds what keylayers did not make.
    """
    with replaced_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, content in (beside or {}).items():
            write_json(temporary / name, content)
        write_json(temporary / RECORD, record)
