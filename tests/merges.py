# SPDX-License-Identifier: Apache-2.0
"""mergekit's rule for weights with filters, and what its own code makes of configs.

    MERGEKIT=python-with-mergekit pytest tests/test_mergekit.py

Run as a script by that Python, it reads a list of {model, config} from stdin. It prints, for each,
the weight of every tensor that mergekit would write: [of the base, of the tuned model] by name.
"""

import json
import sys


def weight_by_rule(entries, tensor_name):
    """The value of the first entry whose filter is part of the name, or that has no filter."""
    for entry in entries:
        if entry.get("filter") is None or entry["filter"] in tensor_name:
            return entry["value"]
    return None


def weights_by_mergekit(model, config):
    """What mergekit's own functions make of the entries, for its own names of the tensors."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration, evaluate_setting
    from mergekit.options import MergeOptions
    from transformers import AutoConfig

    read = MergeConfiguration.model_validate(config)
    names = get_architecture_info(read, MergeOptions()).all_weights(
        AutoConfig.from_pretrained(model)
    )
    settings = [entry.parameters["weight"] for entry in read.models]
    return {
        info.name: [evaluate_setting(info.name, one, validate=float) for one in settings]
        for info in names
    }


if __name__ == "__main__":
    jobs = json.load(sys.stdin)
    print(json.dumps([weights_by_mergekit(**job) for job in jobs]))
