# SPDX-License-Identifier: Apache-2.0
"""Every kind of update the whole way: rank, verify, train the selection, prove what changed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from keylayers import module_weights, rank_modules
from keylayers.apply.trainable import train_only
from keylayers.cli import main
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.errors import ModelError
from keylayers.evaluation.loss import held_out_loss
from keylayers.model import loading
from keylayers.model.loading import load_adapter, load_model, load_tokenizer
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.updates import dense_updates
from keylayers.updates.adapter import own_parameters, tuner_layers
from tiny_files import NUM_MODULES

QUICK = ["--max-steps", "8", "--mask-batches", "2", "--batch-size", "4", "--lora-rank", "4"]
ADAPTERS = ("rslora", "dora", "adalora")
KINDS = (*ADAPTERS, "full")


def keylayers(*arguments):
    return main([str(argument) for argument in arguments])


def rank(tiny, output, *more):
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", output)
    return keylayers("rank", *options, *QUICK, *more)


def read(output):
    return json.loads((output / "ranking.json").read_text())


def scores(output):
    return [module["score"] for module in read(output)["modules"]]


@pytest.fixture(scope="module")
def ranked(tiny, tmp_path_factory):
    folders = {}
    for kind in KINDS:
        folders[kind] = tmp_path_factory.mktemp(kind)
        assert rank(tiny, folders[kind], "--update", kind) == 0
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_ranking_holds_every_module_and_the_update_it_was_made_from(ranked, kind):
    content = read(ranked[kind])
    assert len(content["modules"]) == NUM_MODULES
    assert len(set(scores(ranked[kind]))) == NUM_MODULES
    losses = content["provenance"]["held_out_loss_nats"]
    assert losses["tuned"] < losses["base"]
    assert content["provenance"]["options"]["update"] == kind
    folder = "tuned" if kind == "full" else "adapter"
    assert [one.name for one in ranked[kind].iterdir() if one.is_dir()] == [folder]


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_that_a_run_left_gives_the_same_ranking(tiny, ranked, kind, tmp_path):
    where = ("--tuned", ranked[kind] / "tuned")
    if kind != "full":
        where = ("--adapter", ranked[kind] / "adapter")
    dtype = ("--dtype", "float32")  # as a full fine-tune has it
    assert rank(tiny, tmp_path / "again", *where, *dtype) == 0
    assert scores(tmp_path / "again") == scores(ranked[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_takes_its_stage_1_over(tiny, ranked, kind, capsys):
    before = scores(ranked[kind])
    assert rank(tiny, ranked[kind], "--update", kind) == 0
    assert "stage 1 of the same inputs is taken from" in capsys.readouterr().err
    assert scores(ranked[kind]) == before


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_the_update_beside_the_ranking(ranked, kind, capsys):
    options = ("--points", "4", "--random-orders", "1")
    assert keylayers("verify", "--ranking", ranked[kind], *options) == 0
    found = json.loads((ranked[kind] / "verification.json").read_text())
    losses = found["best_first"]["losses"]
    recorded = read(ranked[kind])["provenance"]["held_out_loss_nats"]
    assert losses[0] == pytest.approx(recorded["base"], abs=1e-4)
    assert losses[-1] == pytest.approx(recorded["tuned"], abs=1e-4)
    assert "another one than was ranked" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_that_a_run_left_is_cut_to_a_selection(tiny, ranked, kind, tmp_path):
    """`prune` itself proves that the loss is that of the update with the other gates closed."""
    output = tmp_path / "cut"
    assert keylayers("prune", "--ranking", ranked[kind], "--budget", "5", "--output", output) == 0
    kept = {one["name"] for one in read(ranked[kind])["modules"] if one["rank"] <= 5}
    if kind == "full":
        after, base = (load_file(path / "model.safetensors") for path in (output, tiny / "model"))
        changed = {name for name in base if not torch.equal(after[name].float(), base[name])}
        assert changed == {f"{name}.weight" for name in kept}
        return
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (ranked[kind] / "adapter", output)
    )
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert {name.removeprefix("base_model.model.").split(".lora_")[0] for name in after} == kept


@pytest.mark.parametrize("kind", ["lora", *ADAPTERS])
def test_the_kind_of_the_ranking_is_trained_on_exactly_the_selection(ranked, kind, tmp_path):
    options = ("--budget", "5", "--steps", "4", "--output", tmp_path / "t")
    given = ("--update", "lora") if kind == "lora" else ()
    assert keylayers("train", "--ranking", ranked.get(kind, ranked["dora"]), *options, *given) == 0
    modules = sorted(read(ranked.get(kind, ranked["dora"]))["modules"], key=lambda one: one["rank"])
    weights = load_file(tmp_path / "t" / "adapter_model.safetensors")
    trained = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights}
    assert trained == {module["name"] for module in modules[:5]}
    config = json.loads((tmp_path / "t" / "adapter_config.json").read_text())
    assert (config["peft_type"] == "ADALORA") == (kind == "adalora")
    assert config.get("use_dora", False) == (kind == "dora")
    assert config.get("use_rslora", False) == (kind == "rslora")


def test_a_4_bit_base_without_bitsandbytes_is_one_clear_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "is_bitsandbytes_available", lambda: False)
    assert rank(tiny, tmp_path / "out", "--load-in-4bit") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("keylayers: `load_in_4bit` needs bitsandbytes, which is not installed")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["lora", "embedding", "4 bits", *KINDS])
def test_several_steps_change_exactly_the_selected_modules(tiny, kind):
    if kind == "4 bits":
        pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    is_packed = kind == "4 bits"
    source = ModelOptions(model=str(tiny / "model"), dtype="float32", load_in_4bit=is_packed)
    model, tokenizer = load_model(source), load_tokenizer(source)
    selected = [info.name for info in map_modules(model)][1::4]
    if kind == "embedding":
        selected.append("model.embed_tokens")
    update = kind if kind in KINDS else "lora"
    options = TrainingOptions(update=update, learning_rate=0.05, warmup_steps=0, lora_rank=4)
    if kind == "full":
        train_only(model, selected)
    else:
        model = new_adapter(model, selected, options, num_steps=6)
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    trainer = make_trainer(model, tokenizer, data.train, options, num_steps=6)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    fine_tune(trainer)
    owners = {
        id(one): name
        for name, layer in tuner_layers(model).items()
        for one in own_parameters(layer)
    }
    changed = {
        owners.get(id(one), name.removesuffix(".weight"))
        for name, one in model.named_parameters()
        if not torch.equal(one, before[name])
    }
    assert changed == set(selected)


def test_adaloras_own_importance_stands_beside_ours(ranked, capsys):
    ranks = read(ranked["adalora"])["provenance"]["adalora_ranks_left"]
    assert len(ranks) == NUM_MODULES
    assert 0 < sum(ranks.values()) <= NUM_MODULES * 6
    assert len(set(ranks.values())) > 1
    assert keylayers("show", ranked["adalora"]) == 0
    out = capsys.readouterr().out
    assert "AdaLoRA's r" in out
    assert "AdaLoRA's own budget (last column) agrees with the scores by tau-b" in out
    assert keylayers("show", ranked["dora"]) == 0
    assert "AdaLoRA" not in capsys.readouterr().out


def test_adaloras_penalty_is_no_part_of_a_held_out_loss(tiny, ranked):
    """The loss of plain cross-entropy on the model's own logits, without PEFT's penalty."""

    source = ModelOptions(model=str(tiny / "model"), dtype="float32")
    model = load_adapter(load_model(source), str(ranked["adalora"] / "adapter"))
    tokenizer = load_tokenizer(source)
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    trainer = make_trainer(model, tokenizer, data.train, TrainingOptions(), num_steps=1)
    total = count = 0.0
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader(data.held_out):
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += float((labels != -100).sum())
    assert held_out_loss(trainer, data.held_out) == pytest.approx(total / count, rel=1e-5)
    weights = [one.orth_reg_weight for one in model.peft_config.values()]
    assert weights == [0.5]


BAD = [
    (("--update", "full", "--load-in-4bit"), "`load_in_4bit` must be left out with `update` full"),
    (("--update", "full", "--dtype", "bfloat16"), "`dtype` must be left out with `update` full"),
    (("--update", "prefix"), "prefix"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_weights_that_cannot_be_trained_are_refused(tiny, tmp_path, options, message, capsys):
    assert rank(tiny, tmp_path / "out", *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_full_fine_tune_in_one_run_is_ranked_from_a_copy_of_its_start(tiny):
    """The same scores as from the two checkpoints on disk; the model keeps what it has learned."""

    source = ModelOptions(model=str(tiny / "model"), dtype="float32")
    model, tokenizer = load_model(source), load_tokenizer(source)
    names = [info.name for info in map_modules(model)]
    train_only(model, names)
    start = module_weights(model)
    assert set(start) == {f"{name}.weight" for name in names}
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    options = TrainingOptions(update="full", learning_rate=0.01, batch_size=4)
    trainer = make_trainer(model, tokenizer, data.train, options, num_steps=4)
    fine_tune(trainer)
    end = {name: one.detach().clone() for name, one in model.named_parameters()}
    ranking = rank_modules(trainer, mask_batches=2, base_weights=start)
    assert all(torch.equal(one, end[name]) for name, one in model.named_parameters())

    base = load_model(source)
    other = make_trainer(base, tokenizer, data.train, options, num_steps=4)
    expected = score_modules(other, dense_updates(base, end), scoring_options(mask_batches=2))
    assert [one.score for one in ranking.modules] == list(expected.scores)
    del start["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"the base weights must hold model.layers.1.mlp.up_proj"):
        rank_modules(trainer, base_weights=start)
    assert all(torch.equal(one, end[name]) for name, one in model.named_parameters())
