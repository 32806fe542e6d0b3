# SPDX-License-Identifier: Apache-2.0
"""Every kind of update the whole way: rank, verify, train the selection, prove what changed."""

import json
import shutil
import warnings
from importlib.util import find_spec

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors.torch import load_file

from architectures import changed_modules
from commands import best, complaint, fresh_process, keylayers, rank, read, record_of, scores
from keylayers import module_weights, rank_modules
from keylayers.apply.trainable import train_only
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.errors import ModelError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.model import loading
from keylayers.model.loading import load_adapter, load_model, load_tokenizer
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.updates import dense_updates
from tiny_files import NUM_MODULES, tiny_tokenizer

from tiny_models import SIZES

ADAPTERS = ("rslora", "dora", "adalora")
OPTIONS = {
    **{kind: ("--update", kind) for kind in (*ADAPTERS, "full")},
    "4 bits": ("--load-in-4bit",),
    "experts": ("--learning-rate", 0.02),
}
NEEDS_4_BITS = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="4-bit bases need bitsandbytes (keylayers[qlora])"
)


def kinds(*names):
    marked = pytest.param("4 bits", marks=NEEDS_4_BITS)
    return pytest.mark.parametrize("kind", [marked if name == "4 bits" else name for name in names])


@pytest.fixture(scope="session")
def mixture(tiny, once):
    """A tiny Mixtral as files, with data."""

    def write(folder):
        tokenizer = tiny_tokenizer()
        torch.manual_seed(0)
        sizes = SIZES | {"num_local_experts": 4, "vocab_size": len(tokenizer)}
        config = hf.MixtralConfig(**sizes)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        shutil.copy(tiny / "data.jsonl", folder)

    return once("mixture", write)


@pytest.fixture
def ranked_as(tiny, mixture, once, tmp_path):
    """A copy of the ranking of a kind of update, with the update that it was made from."""

    def copy_of(kind):
        place = mixture if kind == "experts" else tiny

        def write(folder):
            assert rank(place, folder, *OPTIONS[kind]) == 0

        return shutil.copytree(once(f"ranked-{kind}", write), tmp_path / f"ranked-{kind}")

    return copy_of


@kinds(*OPTIONS)
def test_a_ranking_holds_every_module_and_the_update_it_was_made_from(ranked_as, kind):
    output = ranked_as(kind)
    content, made_by = read(output), read(output)["provenance"]
    num_modules = 12 if kind == "experts" else NUM_MODULES
    assert len(content["modules"]) == len(set(scores(output))) == num_modules
    assert made_by["held_out_loss_nats"]["tuned"] < made_by["held_out_loss_nats"]["base"]
    assert made_by["options"]["update"] == (kind if kind in (*ADAPTERS, "full") else "lora")
    assert made_by["options"]["load_in_4bit"] == (kind == "4 bits")
    folders = [path.name for path in output.iterdir() if path.is_dir()]
    assert folders == ["tuned" if kind == "full" else "adapter"]
    stacked = [module["projection"] for module in content["modules"] if module["is_stacked"]]
    assert stacked == (["gate_up_proj", "down_proj"] * 2 if kind == "experts" else [])


@kinds(*ADAPTERS, "full")
def test_the_update_that_a_run_left_gives_the_same_ranking(tiny, ranked_as, kind, tmp_path):
    output = ranked_as(kind)
    where = ("--tuned", output / "tuned") if kind == "full" else ("--adapter", output / "adapter")
    assert rank(tiny, tmp_path / "again", *where, "--dtype", "float32") == 0  # as for `full`
    assert scores(tmp_path / "again") == scores(output)


@kinds(*ADAPTERS, "full")
def test_a_stopped_run_takes_its_stage_1_over(tiny, ranked_as, kind, capsys):
    output = ranked_as(kind)
    before = scores(output)
    assert rank(tiny, output, *OPTIONS[kind]) == 0
    assert "stage 1 of the same inputs is taken from" in capsys.readouterr().err
    assert scores(output) == before


@kinds(*ADAPTERS, "full", "4 bits")
def test_verify_finds_the_update_next_to_the_ranking(ranked_as, kind, capsys):
    output = ranked_as(kind)
    assert keylayers("verify", "--ranking", output, "--points", 4, "--random-orders", 1) == 0
    found = json.loads((output / "verification.json").read_text())
    assert found["provenance"]["options"]["load_in_4bit"] == (kind == "4 bits")
    losses = found["best_first"]["losses"]
    recorded = read(output)["provenance"]["held_out_loss_nats"]
    assert losses[0] == pytest.approx(recorded["base"], abs=2e-5)
    assert losses[-1] == pytest.approx(recorded["tuned"], abs=2e-5)
    assert "differs from the one that was ranked" not in capsys.readouterr().err


@kinds(*ADAPTERS, "full")
def test_the_update_that_a_run_left_is_cut_to_a_selection(tiny, ranked_as, kind, tmp_path):
    """`prune` itself proves that the loss is that of the update with the other gates closed."""
    ranked, output = ranked_as(kind), tmp_path / "cut"
    assert keylayers("prune", "--ranking", ranked, "--budget", 5, "--output", output) == 0
    if kind == "full":
        after, base = (load_file(path / "model.safetensors") for path in (output, tiny / "model"))
        changed = {name for name in base if not torch.equal(after[name].float(), base[name])}
        assert changed == {f"{name}.weight" for name in best(ranked, 5)}
        return
    before = load_file(ranked / "adapter" / "adapter_model.safetensors")
    after = load_file(output / "adapter_model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert modules_in(after) == best(ranked, 5)


def modules_in(weights):
    return {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights}


EXPERTS_OF_PLAIN_PEFT = """
import sys
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora.layer import ParamWrapper
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
found = [each.parameter_name for each in model.modules() if isinstance(each, ParamWrapper)]
print(*sorted(found))
"""


@pytest.mark.parametrize("budget", [1, 5, 11])
def test_an_adapter_on_experts_is_cut_to_the_best_modules(ranked_as, budget, tmp_path):
    ranked, output = ranked_as("experts"), tmp_path / "cut"
    assert keylayers("prune", "--ranking", ranked, "--budget", budget, "--output", output) == 0
    kept = best(ranked, budget)
    assert set(record_of(output)["result"]["modules"]) == kept
    experts = sorted(name.rpartition(".")[2] for name in kept if ".experts." in name)
    assert fresh_process(EXPERTS_OF_PLAIN_PEFT, output) == experts
    assert len(load_file(output / "adapter_model.safetensors")) == 2 * budget


@kinds("lora", *ADAPTERS, "4 bits")
def test_the_kind_of_the_ranking_is_trained_on_exactly_the_selection(
    tiny, ranked_as, kind, tmp_path
):
    ranked, output = ranked_as("dora" if kind == "lora" else kind), tmp_path / "trained"
    given = ("--update", "lora") if kind == "lora" else ()
    options = ("--budget", 5, "--steps", 4, "--output", output, *given)
    assert keylayers("train", "--ranking", ranked, *options) == 0
    assert modules_in(load_file(output / "adapter_model.safetensors")) == best(ranked, 5)
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
        assert set(plain.targeted_module_names) == best(ranked, 5)


@kinds("lora", "embedding", "4 bits", *ADAPTERS, "full")
def test_several_steps_change_exactly_the_selected_modules(tiny, kind):
    model, tokenizer = opened(tiny, load_in_4bit=kind == "4 bits")
    selected = [info.name for info in map_modules(model)][1::4]
    if kind == "embedding":
        selected.append("model.embed_tokens")
    update = kind if kind in (*ADAPTERS, "full") else "lora"
    options = TrainingOptions(update=update, learning_rate=0.05, warmup_steps=0, lora_rank=4)
    if kind == "full":
        train_only(model, selected)
    else:
        model = new_adapter(model, selected, options, num_steps=6)
    trainer = make_trainer(model, tokenizer, data_of(tiny).train, options, num_steps=6)
    assert changed_modules(trainer, fine_tune) == set(selected)


def opened(tiny, **options):
    """The tiny model in float32, and its tokenizer."""
    source = ModelOptions(model=str(tiny / "model"), dtype="float32", **options)
    return load_model(source), load_tokenizer(source)


def data_of(tiny):
    tokenizer = load_tokenizer(ModelOptions(model=str(tiny / "model")))
    return prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)


def test_adaloras_own_importance_is_shown_next_to_ours(ranked_as, capsys):
    output = ranked_as("adalora")
    ranks = read(output)["provenance"]["adalora_ranks_left"]
    assert len(ranks) == NUM_MODULES
    assert 0 < sum(ranks.values()) <= NUM_MODULES * 6
    assert len(set(ranks.values())) > 1
    assert keylayers("show", output) == 0
    out = capsys.readouterr().out
    assert "AdaLoRA's r" in out
    assert "AdaLoRA's own budget (last column) agrees with the scores by tau-b" in out
    assert keylayers("show", ranked_as("dora")) == 0
    assert "AdaLoRA" not in capsys.readouterr().out


def test_adaloras_penalty_is_no_part_of_a_held_out_loss(tiny, ranked_as):
    """The loss of plain cross-entropy on the model's own logits, without PEFT's penalty."""
    model, tokenizer = opened(tiny)
    model = load_adapter(model, str(ranked_as("adalora") / "adapter"))
    data = data_of(tiny)
    trainer = make_trainer(model, tokenizer, data.train, TrainingOptions(), num_steps=1)
    total = count = 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(data.held_out):
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += float((labels != -100).sum())
    assert held_out_loss(trainer, data.held_out) == pytest.approx(total / count, rel=1e-5)
    assert [config.orth_reg_weight for config in model.peft_config.values()] == [0.5]


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
    model, tokenizer = opened(tiny)
    names = [info.name for info in map_modules(model)]
    train_only(model, names)
    start = module_weights(model)
    assert set(start) == {f"{name}.weight" for name in names}
    options = TrainingOptions(update="full", learning_rate=0.01, batch_size=4)
    train = data_of(tiny).train
    trainer = make_trainer(model, tokenizer, train, options, num_steps=4)
    fine_tune(trainer)
    end = {name: value.detach().clone() for name, value in model.named_parameters()}
    ranking = rank_modules(trainer, mask_batches=2, base_weights=start)

    base, _ = opened(tiny)
    other = make_trainer(base, tokenizer, train, options, num_steps=4)
    expected = score_modules(other, dense_updates(base, end), scoring_options(mask_batches=2))
    assert [module.score for module in ranking.modules] == list(expected.scores)
    del start["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"the base weights must hold model.layers.1.mlp.up_proj"):
        rank_modules(trainer, base_weights=start)
    assert all(torch.equal(value, end[name]) for name, value in model.named_parameters())
