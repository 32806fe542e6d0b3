# SPDX-License-Identifier: Apache-2.0
"""Configs through axolotl's own code: its plugins, its checks, its training.

Run by a Python that has axolotl, it reads a list of jobs from stdin, each a config `file` and
whether to train. It prints what axolotl makes of each config, or the error.
"""

import contextlib
import json
import sys

from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets, load_preference_datasets
from axolotl.integrations.base import BasePlugin
from axolotl.train import train


class UnfreezesLater(BasePlugin):
    """Sets what is trained after the config was checked, as axolotl's plugin for Spectrum does."""

    def pre_model_load(self, cfg):
        cfg["unfrozen_parameters"] = ["model.norm"]


def answer(file, is_trained):
    try:
        config = load_cfg(file)
        if is_trained:
            load = load_preference_datasets if config.rl else load_datasets
            train(cfg=config, dataset_meta=load(cfg=config))
    except (ValueError, RuntimeError) as error:  # of keylayers, and of pydantic
        return {"error": f"{type(error).__name__}: {error}"}
    return json.loads(json.dumps(config.to_dict(), default=str))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answers = [answer(**job) for job in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(answers))
