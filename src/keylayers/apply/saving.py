# SPDX-License-Identifier: Apache-2.0
"""A tuned model on disk: an ordinary adapter or checkpoint, its tokenizer and its record."""

import shutil
from collections.abc import Mapping, Sequence
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
) -> None:
    """Write a PEFT model's adapter, or a whole checkpoint, all or nothing.

    Raises:
        OutputError: the folder cannot be written, or holds what keylayers did not make.
    """
    with replaced_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / RECORD, record)


def copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copy those files of `source` that match `patterns` to the same places in `folder`."""
    for path in dict.fromkeys(path for pattern in patterns for path in source.glob(pattern)):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
