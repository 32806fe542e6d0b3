# SPDX-License-Identifier: Apache-2.0
"""Our scores of known rankings against the authors' own code, on one model.

    python experiments/own_code.py --model MODEL --data DATA --spectrum FOLDER --plop FOLDER
        --aletheia FOLDER --output record.json

The folders are checkouts of QuixiAI/spectrum, soufiane001/plop and the `src` of
aletheiaprotocol-ai/aletheia-lora; none of their code is kept here. KappaTune, EVA and AdaLoRA are
PEFT's own code already.

Both sides are timed in turn, three times: what they take for the same scores of the same model, the
methods that need no data without the loading of it.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from datasets import Dataset
from peft import find_kappa_target_modules
from scipy.stats import kendalltau

from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.environment import environment
from keylayers.files import write_json
from keylayers.model.loading import load_model, load_tokenizer, max_positions
from keylayers.model.modules import blocks_of, map_modules
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.scores.spectrum import signal_to_noise
from keylayers.training.options import TrainingOptions
from keylayers.training.run import make_trainer, new_adapter
from keylayers.updates import adapter_updates

NUM_EXAMPLES = 5
NUM_ROUNDS = 3


def in_turn(ours, theirs):
    """What both sides return, and the seconds of each in every round."""
    seconds = {"seconds": [], "own_code_seconds": []}
    for _ in range(NUM_ROUNDS):
        start = time.perf_counter()
        own = ours()
        seconds["seconds"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            other = theirs()
        seconds["own_code_seconds"].append(time.perf_counter() - start)
    return own, other, seconds


def compared(ours, theirs, seconds):
    """How far two scores of the same things agree, and what they took."""
    names = list(ours)
    pairs = [(ours[name], theirs[name]) for name in names]
    relative = max(abs(a - b) / abs(b) for a, b in pairs)
    return {
        "num_scores": len(names),
        "largest_relative_difference": relative,
        "tau_b": float(kendalltau(*zip(*pairs, strict=True)).statistic),
        **seconds,
        "time_ratio": statistics.median(seconds["own_code_seconds"])
        / statistics.median(seconds["seconds"]),
    }


def spectrum(folder, model):
    """Signal-to-noise ratios of every module."""
    dialogs = ModuleType("prompt_toolkit.shortcuts")  # it asks in a terminal, only from its main
    dialogs.checkboxlist_dialog = dialogs.input_dialog = None
    sys.modules["prompt_toolkit"] = ModuleType("prompt_toolkit")
    sys.modules["prompt_toolkit.shortcuts"] = dialogs
    sys.path.insert(0, str(folder))
    from spectrum import ModelModifier

    theirs = ModelModifier()
    theirs.model = model
    names = [one.name for one in map_modules(model)]
    kinds = list(dict.fromkeys(one.projection for one in map_modules(model)))

    def run():
        theirs.layer_snr = {}
        for kind in kinds:
            theirs.calculate_snr_for_layer(kind)
        return theirs.layer_snr

    def own():
        weights = ((name, model.get_submodule(name).weight.detach()) for name in names)
        return {name: signal_to_noise(weight) for name, weight in weights}

    ours, found, seconds = in_turn(own, run)
    return compared(ours, {name: found[name]["snr"] for name in names}, seconds)


def kappatune(model, score):
    """The condition numbers' best 30 %, since PEFT gives no scores."""

    def run():
        return find_kappa_target_modules(model, top_p=0.3, show_progress=False)["target_modules"]

    ours, found, seconds = in_turn(lambda: score("kappatune"), run)
    names = [name for name in found if name in ours]  # without the head
    best = sorted(ours, key=lambda name: -ours[name])[: len(names)]
    return {
        "num_scores": len(ours),
        "same_selected": set(best) == set(names),
        **seconds,
        "time_ratio": statistics.median(seconds["own_code_seconds"])
        / statistics.median(seconds["seconds"]),
    }


def plop(folder, model, score, batch):
    """Normalised feature norms of every module on one batch without padding."""
    sys.path.insert(0, str(folder))
    from src.metrics import calculate_nfn_scores

    def run():
        torch.manual_seed(0)
        return calculate_nfn_scores(model, batch)

    found, theirs, seconds = in_turn(lambda: score("plop"), run)
    ours = {name: -score for name, score in found.items()}
    return compared(ours, {name: float(theirs[name]["nfn"]) for name in ours}, seconds)


def aletheia(folder, model, score, dataset):
    """Summed gradient norms of every block, single examples, loss on all tokens."""
    sys.path.insert(0, str(folder))
    from aletheia_lora.probe import gradient_probe

    num_blocks = len(blocks_of(model))
    rows = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
        for ids in dataset["input_ids"]
    ]
    found, theirs, seconds = in_turn(
        lambda: score("aletheia"),
        lambda: gradient_probe(model, rows, num_blocks, probe_batches=len(rows)),
    )
    ours = {
        block: NUM_EXAMPLES * next(s for n, s in found.items() if f"layers.{block}." in n)
        for block in range(num_blocks)
    }
    return compared(ours, theirs, seconds)


def prepared(arguments):
    """The base model, and a trainer on a few single examples of one length with the loss on all."""
    options = ModelOptions(model=str(arguments.model), dtype="float32")
    tokenizer, model = load_tokenizer(options), load_model(options)
    data = prepare(
        DataOptions(data=str(arguments.data), max_length=96, mask_data="train"),
        tokenizer,
        max_positions(model),
    )
    rows = [ids for ids in data.train["input_ids"] if len(ids) == 96][:NUM_EXAMPLES]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    training = TrainingOptions(batch_size=1)
    tuned = new_adapter(
        load_model(options), [one.name for one in map_modules(model)], training, num_steps=1
    )
    return SimpleNamespace(
        model=model,
        dataset=dataset,
        trainer=make_trainer(tuned, tokenizer, dataset, training, num_steps=1),
    )


def main():
    """Compare whichever checkouts are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--spectrum", type=Path, required=True)
    parser.add_argument("--plop", type=Path, required=True)
    parser.add_argument("--aletheia", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = prepared(arguments)

    def scored(method):
        size = {} if method == "kappatune" else {"mask_batches": NUM_EXAMPLES}
        options = scoring_options(method=method, **size)
        found = score_modules(task.trainer, adapter_updates(task.trainer.model), options)
        return dict(zip(found.module_names, found.scores, strict=True))

    batch = {"input_ids": torch.tensor(task.dataset["input_ids"])}
    record = {
        "environment": environment(),
        "model": arguments.model.name,
        "data": arguments.data.name,
        "spectrum": spectrum(arguments.spectrum, task.model),
        "kappatune": kappatune(task.model, scored),
        "plop": plop(arguments.plop, task.model, scored, batch),
        "aletheia": aletheia(arguments.aletheia, task.model, scored, task.dataset),
    }
    for name in ("spectrum", "kappatune", "plop", "aletheia"):
        print(name, record[name])
    write_json(arguments.output, record)


if __name__ == "__main__":
    main()
