# SPDX-License-Identifier: Apache-2.0
"""Every kind of update the whole way: rank, verify, train the selection, prove what changed."""

import json
import re
import warnings
from importlib.util import find_spec

import pytest
import torch
import transformers as hf
from peft import PeftModel

from architectures import changed_modules
from commands import (
    EXPERTS_OF_PLAIN_PEFT,
    best,
    changed_weights,
    complaint,
    fresh_process,
    keylayers,
    modules_in,
    rank,
    read,
    record_of,
    scores,
    verified_in,
    weights_in,
)
from keylayers import module_weights, rank_modules
from keylayers.apply.trainable import train_only
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.errors import ModelError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.model import loading
from keylayers.model.loading import load_model, load_tokenizer
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.updates import dense_updates
from scored import check_gradient, masked
from tiny_files import NUM_MODULES, write_mixture

ADAPTERS = ("rslora", "dora", "adalora")
OPTIONS = {
    **{kind: ("--update", kind) for kind in (*ADAPTERS, "full")},
    "4 bits": ("--load-in-4bit",),
    "experts": ("--learning-rate", 0.02),
    "full experts": ("--update", "full"),
}
NEEDS_4_BITS = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="4-bit bases need bitsandbytes (keylayers[qlora])"
)


def kinds(*names):
    marked = pytest.param("4 bits", marks=NEEDS_4_BITS)
    return pytest.mark.parametrize("kind", [marked if name == "4 bits" else name for name in names])


@kinds(*OPTIONS)
def test_rank_again_verify_prune_and_train(tiny, kind, tmp_path, capsys):
    ranked, again, options = tmp_path / "ranked", tmp_path / "again", OPTIONS[kind]
    place = tmp_path if "experts" in kind else tiny
    if "experts" in kind:
        write_mixture(tiny, tmp_path)
    assert rank(place, ranked, *options) == 0
    update = "tuned" if "full" in kind else "adapter"
    assert [path.name for path in ranked.iterdir() if path.is_dir()] == [update]
    found, recorded = scores(ranked), check_ranking(ranked, kind)

    given = (f"--{update}", ranked / update, "--dtype", "float32")  # as for `full`
    in_4_bits = options if kind == "4 bits" else ()
    assert rank(place, again, *in_4_bits, *given) == 0
    assert rank(place, ranked, *options) == 0
    assert "stage 1 of the same inputs is taken from" in capsys.readouterr().err
    assert scores(again) == scores(ranked) == found

    assert keylayers("verify", "--ranking", ranked, "--points", 4, "--random-orders", 1) == 0
    verified = verified_in(ranked)
    assert verified["provenance"]["options"]["load_in_4bit"] == (kind == "4 bits")
    losses = verified["best_first"]["losses"]
    assert losses[:: len(losses) - 1] == pytest.approx(recorded, abs=2e-5)
    assert "differs from the one that was ranked" not in capsys.readouterr().err

    assert keylayers("show", ranked) == 0
    shown = capsys.readouterr().out
    assert ("AdaLoRA's r" in shown) == (kind == "adalora")
    own = "AdaLoRA's own budget (last column) agrees with the scores by tau-b"
    assert (own in shown) == (kind == "adalora")
    assert ("at budget 0.3 (chance" in shown.replace("\n", " ")) == (kind == "adalora")

    for budget in (1, 5, 11) if kind == "experts" else (5,):
        check_pruned(ranked, kind, budget, place)
    if kind == "full experts":
        output = tmp_path / "trained"
        given = ("--budget", 5, "--steps", 2, "--output", output)
        assert keylayers("train", "--ranking", ranked, *given) == 0
        assert changed_parameters(place, output) == parameters_of(best(ranked, 5))
    if "full" not in kind and "experts" not in kind:
        check_trained(ranked, kind, tiny)
    if kind == "dora":
        check_trained(ranked, "lora", tiny, "--update", "lora")


def check_ranking(ranked, kind):
    """Every module and the update are in the ranking; the losses of base and tuned model."""
    content, made_by = read(ranked), read(ranked)["provenance"]
    assert len(set(scores(ranked))) == (12 if "experts" in kind else NUM_MODULES)
    update = kind.partition(" ")[0]
    assert made_by["options"]["update"] == (update if update in (*ADAPTERS, "full") else "lora")
    assert made_by["options"]["load_in_4bit"] == (kind == "4 bits")
    stacked = [module["projection"] for module in content["modules"] if module["is_stacked"]]
    assert stacked == (["gate_up_proj", "down_proj"] * 2 if "experts" in kind else [])
    if kind == "adalora":
        ranks = made_by["adalora_ranks_left"]
        assert len(ranks) == NUM_MODULES
        assert 0 < sum(ranks.values()) <= NUM_MODULES * 6
        assert len(set(ranks.values())) > 1
    losses = made_by["held_out_loss_nats"]
    assert losses["tuned"] < losses["base"]
    return [losses["base"], losses["tuned"]]


# Mixtral's experts as they are stored, and the parameter that transformers makes of them.
EXPERT = re.compile(r"block_sparse_moe\.experts\.\d+\.(w\d)\.weight")


def changed_parameters(place, folder):
    """The parameters that differ from the base model's."""

    def stacked(found):
        return f"mlp.experts.{'down_proj' if found[1] == 'w2' else 'gate_up_proj'}"

    return {EXPERT.sub(stacked, name) for name in changed_weights(place / "model", folder)}


def parameters_of(modules):
    return {name if ".experts." in name else f"{name}.weight" for name in modules}


def check_pruned(ranked, kind, budget, place):
    """`prune` itself proves that the loss is that of the update with the other gates closed."""
    output, kept = ranked.parent / f"cut {budget}", best(ranked, budget)
    assert keylayers("prune", "--ranking", ranked, "--budget", budget, "--output", output) == 0
    assert set(record_of(output)["result"]["modules"]) == kept
    if "full" in kind:
        assert changed_parameters(place, output) == parameters_of(kept)
        return
    before, after = weights_in(ranked / "adapter"), weights_in(output)
    if kind == "experts":
        experts = sorted(name.rpartition(".")[2] for name in kept if ".experts." in name)
        assert fresh_process(EXPERTS_OF_PLAIN_PEFT, output) == experts
        assert len(after) == 2 * budget
    else:
        assert all(torch.equal(value, before[name]) for name, value in after.items())
        assert modules_in(output) == kept


def check_trained(ranked, kind, tiny, *given):
    """The ranking's kind of update is trained on exactly the selection, unless another is given."""
    output, kept = ranked.parent / f"trained {kind}", best(ranked, 5)
    options = ("--budget", 5, "--steps", 4, "--output", output, *given)
    assert keylayers("train", "--ranking", ranked, *options) == 0
    assert modules_in(output) == kept
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["peft_type"] == "ADALORA") == (kind == "adalora")
    assert config.get("use_dora", False) == (kind == "dora")
    assert config.get("use_rslora", False) == (kind == "rslora")
    record, ranking = record_of(output), read(ranked)["provenance"]
    assert record["options"]["load_in_4bit"] == (kind == "4 bits")
    base_loss = ranking["held_out_loss_nats"]["base"]
    assert record["results"][0]["held_out_loss_nats"] == pytest.approx(base_loss, rel=1e-5)
    if kind == "4 bits":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the libraries are the user's
            packed = hf.BitsAndBytesConfig(load_in_4bit=True)
            base = hf.AutoModelForCausalLM.from_pretrained(
                tiny / "model", quantization_config=packed
            )
            plain = PeftModel.from_pretrained(base, output)
        assert set(plain.targeted_module_names) == kept


class Opened:
    """The tiny model in float32, its tokenizer and its data."""

    def __init__(self, tiny, **options):
        source = ModelOptions(model=str(tiny / "model"), dtype="float32", **options)
        self.model, self.tokenizer = load_model(source), load_tokenizer(source)
        self.names = [info.name for info in map_modules(self.model)]
        self.data = prepare(DataOptions(data=str(tiny / "data.jsonl")), self.tokenizer, 64)

    def trainer(self, names, num_steps=6, **options):
        """A trainer of some modules, as keylayers makes it."""
        options = TrainingOptions(**{"warmup_steps": 0, "lora_rank": 4, "batch_size": 4} | options)
        if options.update == "full":
            train_only(self.model, names)
        elif names:
            self.model = new_adapter(self.model, names, options, num_steps=num_steps)
        return make_trainer(
            self.model, self.tokenizer, self.data.train, options, num_steps=num_steps
        )


@kinds("lora", "embedding", "4 bits", *ADAPTERS, "full")
def test_several_steps_change_exactly_the_selected_modules(tiny, kind):
    opened = Opened(tiny, load_in_4bit=kind == "4 bits")
    selected = opened.names[1::4] + ["model.embed_tokens"] * (kind == "embedding")
    update = kind if kind in (*ADAPTERS, "full") else "lora"
    trainer = opened.trainer(selected, update=update, learning_rate=0.05)
    assert changed_modules(trainer, fine_tune) == set(selected)


@kinds("4 bits")
def test_a_base_in_4_bits_has_exact_gates_and_is_left_alone(tiny, kind):
    """On some processors bitsandbytes packs weights again in evaluation, with rounded scales."""
    opened = Opened(tiny, load_in_4bit=True)
    trainer = opened.trainer(opened.names, 10, learning_rate=0.02)
    layers = [each for each in trainer.model.modules() if type(each).__name__ == "Linear4bit"]
    assert layers
    fine_tune(trainer)
    with masked(trainer, 0.0) as (gates, source):
        check_gradient(gates, source, next(source.batches(0)))
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on such a processor
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    held_out_loss(trainer, trainer.train_dataset)
    rank_modules(trainer, mask_batches=1)
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_adaloras_penalty_is_no_part_of_a_held_out_loss(tiny):
    """The loss of plain cross-entropy on the model's own logits, without PEFT's penalty."""
    opened = Opened(tiny)
    trainer = opened.trainer(opened.names, update="adalora")
    fine_tune(trainer)
    total = count = 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(opened.data.held_out):
            logits = opened.model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += float((labels != -100).sum())
    assert held_out_loss(trainer, opened.data.held_out) == pytest.approx(total / count, rel=1e-5)
    assert [config.orth_reg_weight for config in opened.model.peft_config.values()] == [0.5]


BAD = [
    (("--update", "full", "--load-in-4bit"), "`load_in_4bit` must be left out with `update` full"),
    (("--update", "full", "--dtype", "bfloat16"), "`dtype` must be left out with `update` full"),
    (("--update", "prefix"), "prefix"),
    (("--load-in-4bit",), "`load_in_4bit` needs bitsandbytes, which is not installed"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_trained_is_refused(tiny, tmp_path, options, message, monkeypatch, capsys):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    assert rank(tiny, tmp_path / "out", *options) == 2
    assert message in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_a_full_fine_tune_in_one_run_is_ranked_from_a_copy_of_its_start(tiny):
    """The same scores as from the two checkpoints on disk; the model keeps what it has learned."""
    opened, base = Opened(tiny), Opened(tiny)
    trainer = opened.trainer(opened.names, 4, update="full", learning_rate=0.01)
    start = module_weights(opened.model)
    assert set(start) == {f"{name}.weight" for name in opened.names}
    fine_tune(trainer)
    end = {name: value.detach().clone() for name, value in opened.model.named_parameters()}
    ranking = rank_modules(trainer, mask_batches=2, base_weights=start)

    updates = dense_updates(base.model, end)
    expected = score_modules(base.trainer([]), updates, scoring_options(mask_batches=2))
    assert [module.score for module in ranking.modules] == list(expected.scores)
    del start["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"the base weights must hold model.layers.1.mlp.up_proj"):
        rank_modules(trainer, base_weights=start)
    assert all(torch.equal(value, end[name]) for name, value in opened.model.named_parameters())
