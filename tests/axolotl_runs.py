# SPDX-License-Identifier: Apache-2.0
"""Configs through axolotl's own code: its plugins, its checks, its training.

Run by a Python that has axolotl, it reads a list of jobs from stdin, each a config `file` and
whether to train. It prints for each what `axolotl train` makes of the config, or the error.
"""

import contextlib
import json
import sys

import yaml


def answer(file, is_trained):
    """The keys of the config after axolotl's checks, or the last line of the error."""
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.train import train

    try:
        config = load_cfg(file)
        if is_trained:
            load = load_preference_datasets if config.rl else load_datasets
            train(cfg=config, dataset_meta=load(cfg=config))
    except ValueError as error:  # keylayers' own errors and pydantic's are of this kind
        return {"error": f"{type(error).__name__}: {error}"}
    except RuntimeError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    with open(file) as written:
        given = yaml.safe_load(written)
    keys = ("gradient_checkpointing_kwargs", "unfrozen_parameters")
    return {
        key: value
        for key, value in config.to_dict().items()
        if key in given or key in keys or key.startswith("lora_")
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answers = [answer(**job) for job in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(answers))
