# SPDX-License-Identifier: Apache-2.0
"""mergekit's rule for weights with filters; as a script, mergekit itself.

Run by a Python that has mergekit, the script reads a list of jobs from stdin. A job with an
`output` is merged to that folder. For one with a `model` it prints the weights of every tensor that
mergekit would write, [of the base, of the tuned model] by name.
"""

import json
import sys


def weight_by_rule(entries, tensor_name):
    """The value of the first entry whose filter is part of the name, or that has no filter."""
    for entry in entries:
        if entry.get("filter") is None or entry["filter"] in tensor_name:
            return entry["value"]
    return None


def weights_by_mergekit(config, model):
    """What mergekit's own functions make of the entries, for its own names of the tensors."""
    from mergekit.architecture import get_architecture_info
    from mergekit.config import evaluate_setting
    from mergekit.options import MergeOptions
    from transformers import AutoConfig

    architecture = get_architecture_info(config, MergeOptions())
    settings = [entry.parameters["weight"] for entry in config.models]
    return {
        info.name: [evaluate_setting(info.name, one, validate=float) for one in settings]
        for info in architecture.all_weights(AutoConfig.from_pretrained(model))
    }


def answer(config, model=None, output=None):
    """Merge, or tell the weights."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(config)
    if model is not None:
        return weights_by_mergekit(config, model)
    return run_merge(config, output, MergeOptions(lora_merge_cache=f"{output}-lora", quiet=True))


if __name__ == "__main__":
    answers = [answer(**job) for job in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(answers))
