# SPDX-License-Identifier: Apache-2.0
"""Small data sets for tests of data, and what their examples say."""

import json
import re

from transformers import ByT5Tokenizer

from keylayers.data.chat import IGNORED
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare as prepare_data

TOKENIZER = ByT5Tokenizer()  # needs no files: one token per byte
ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PAIRS = [{"prompt": f"Say {i}.", "chosen": "Good.", "rejected": "Bad."} for i in range(20)]
RATED = [{"prompt": f"Say {i}.", "completion": "Good.", "label": i % 2 == 0} for i in range(20)]


def prepare(data, max_positions=None, objective="sft", tokenizer=TOKENIZER, **options):
    options = DataOptions(data=str(data), **{"mask_data": "train"} | options)
    return prepare_data(options, tokenizer, max_positions, objective)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def texts(examples):
    """What each example says, whatever its columns are."""
    if "input_ids" in examples.column_names:
        return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in examples["input_ids"]]
    return [turns[0]["content"] for turns in examples["prompt"]]


def learned(row, tokenizer=TOKENIZER):
    """The text that the loss counts."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def numbers(examples):
    return [int(re.search(r"Say (\d+)", text).group(1)) for text in texts(examples)]
