# SPDX-License-Identifier: Apache-2.0
"""`keylayers eval` from options to files, on a tiny model, two adapters and a checkpoint."""

import json
import shutil
from contextlib import chdir

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from commands import keylayers, printed
from eval_files import ALL, NAMES, evaluation_of, write_place
from keylayers.evaluation.documents import Store
from prepared import prepare
from tiny_files import tiny_tokenizer


@pytest.fixture(scope="module")
def evaluated(eval_folder, tmp_path_factory):
    """The whole evaluation, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    with chdir(eval_folder):
        code, out, err = printed("eval", *ALL, "--output", folder)
    assert code == 0, err
    assert "it/s" not in err  # bars of the harness
    return evaluation_of(folder), out, folder


@pytest.fixture(scope="module")
def table(evaluated):
    return pd.read_parquet(evaluated[2] / "documents.parquet")


def measure(found, task, metric):
    (one,) = [one for one in found.measures if (one.task, one.metric) == (task, metric)]
    return one


def values(found, task, metric):
    return {one.model: one.value for one in measure(found, task, metric).results}


HARNESS = [
    *(("foods", "acc"), ("foods", "acc_norm"), ("three", "acc"), ("five", "acc_norm")),
    *(("written", "exact_match"), ("rolling", "word_perplexity")),
]


@pytest.mark.parametrize(("name", "peft"), [("base model", ""), ("other", ",peft=other")])
def test_every_number_is_that_of_the_harness(evaluated, place, name, peft):
    """Which loads model and adapter in its own way."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained=model,dtype=float32{peft}",
        tasks=["foods", "written", "rolling"],
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )["results"]
    theirs = {key: found[key[0]][f"{key[1]},none"] for key in HARNESS}
    ours = {key: values(evaluated[0], *key)[name] for key in HARNESS}
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert len(set(values(evaluated[0], "rolling", "word_perplexity").values())) == 4


def test_a_loss_is_that_of_transformers_on_each_model_by_itself(evaluated, place):
    """On the base after both adapters were on it, too: it is measured first and hashed after."""
    # as `rank` and `train` split it
    held_out = prepare(place / "data.jsonl", 64, "sft", tiny_tokenizer(), max_length=32).held_out
    found = values(evaluated[0], "held-out data", "loss")
    for name in NAMES:
        source = place / ("tuned" if name == "tuned" else "model")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        if name in ("adapter", "other"):
            model = PeftModel.from_pretrained(model, place / name)
        total = num = 0
        for one in held_out:
            labels = torch.tensor([one["labels"]])
            count = int((labels[:, 1:] != -100).sum())
            with torch.no_grad():
                loss = model.eval()(torch.tensor([one["input_ids"]]), labels=labels).loss
            total, num = total + float(loss) * count, num + count
        assert found[name] == pytest.approx(total / num, rel=1e-5), name


def test_differences_are_taken_document_by_document(evaluated, table):
    rows = table[(table["task"] == "forgetting") & (table["metric"] == "loss")]
    wide = rows.pivot(index="document", columns="model", values="value")
    num_tokens = rows[rows["model"] == "base model"]["size"].sum()
    compared = {}
    for result in measure(evaluated[0], "forgetting", "loss").results:
        compared[result.model] = [one.against for one in result.differences]
        for one in result.differences:
            own = (wide[result.model] - wide[one.against]).sum() / num_tokens
            assert one.value == pytest.approx(own)
            assert one.interval.low <= one.value <= one.interval.high
    both = ["base model", "adapter"]
    assert compared == dict(zip(NAMES, ([], both[:1], both, both), strict=True))
    assert set(table["task"]) == {"held-out data", "forgetting", "three", "five", "written"}
    assert set(table["model"]) == set(NAMES)


CHANCE = {
    ("three", "acc"): 1 / 3,
    ("foods", "acc"): (9 / 3 + 6 / 5) / 15,
    ("foods", "acc_norm"): (1 / 3 + 1 / 5) / 2,
    ("written", "exact_match"): None,
    ("rolling", "word_perplexity"): None,
}


def test_chance_is_known_document_by_document(evaluated):
    found = {name: measure(evaluated[0], *name).chance for name in CHANCE}
    assert found == pytest.approx(CHANCE)


SHOWN = [
    *("held-out data, nats per token", "forgetting, nats per token", "foods, acc"),  # in this order
    *("15 documents, chance 0.280", "not above chance", "no difference shown"),
    *("against base model", "against adapter", "by chance alone", "Holm's correction"),
    *("no interval", "fewer than 30 documents"),  # of the perplexity, which is no mean
]


def test_the_table_says_what_is_noise_and_shows_gain_beside_forgetting(evaluated):
    places = [evaluated[1].find(text) for text in SHOWN]
    assert -1 not in places
    assert places[:3] == sorted(places[:3])


def test_what_is_recorded_says_how_it_came_about(evaluated):
    found, _, _ = evaluated
    made, about = found.provenance, found.models
    assert made["options"]["tasks"] == ["foods", "written", "rolling"]
    assert made["environment"]["evaluation_libraries"]["lm_eval"]
    assert (list(about), found.reference) == (NAMES, "adapter")
    assert about["base model"]["weights_sha256"] != about["tuned"]["weights_sha256"]
    assert about["adapter"]["adapter_sha256"] != about["other"]["adapter_sha256"]
    assert len(made["pairs"]) == len({one["pair"] for one in made["pairs"]}) == 4 * 6
    assert {one["inputs_sha256"] for one in made["pairs"] if one["task"] == "three"}
    assert made["inputs"]["held-out data"]["content_sha256"]


def watch(monkeypatch, stop_at=None):
    """The keys of the pairs that are measured, until Ctrl-C comes at number `stop_at`."""
    kept, put = [], Store.put

    def counted(store, key, found):
        if len(kept) == stop_at:
            raise KeyboardInterrupt
        kept.append(key)
        put(store, key, found)

    monkeypatch.setattr(Store, "put", counted)
    return kept


def test_a_run_that_was_stopped_goes_on(evaluated, table, place, tmp_path, monkeypatch, capsys):
    """At several places; nothing that was finished is measured again, and the end is the same."""
    out, kept = tmp_path / "out", []
    for at, code in ((4, 130), (11, 130), (None, 0)):
        with monkeypatch.context() as patched:
            kept.append(watch(patched, at))
            assert keylayers("eval", *ALL, "--output", out) == code
        assert (out / "evaluation.json").exists() == (code == 0)
    assert sum(map(len, kept)) == len(set().union(*kept)) == 24
    whole = (out / "documents.parquet").read_bytes()
    pd.testing.assert_frame_equal(table, pd.read_parquet(out / "documents.parquet"))
    records = [json.loads((one / "evaluation.json").read_text()) for one in (evaluated[2], out)]
    for one in records:
        del one["provenance"]["environment"]  # the commit may change while tests run
    assert records[0] == records[1]
    again = watch(monkeypatch)
    assert keylayers("eval", *ALL, "--output", out) == 0
    assert again == []
    assert "tuned: all measured before" in capsys.readouterr().err
    assert (out / "documents.parquet").read_bytes() == whole
    assert evaluation_of(out).measures == evaluated[0].measures
    assert not [*tmp_path.glob(".*"), *out.glob(".*")]


def test_only_what_changes_is_measured_again(evaluated, table, tiny, tmp_path, monkeypatch):
    place, out = tmp_path / "place", tmp_path / "out"
    place.mkdir()
    write_place(tiny, place)
    task = place / "tasks" / "five.jsonl"
    task.write_text(task.read_text().replace("eats", "likes", 1))
    shutil.copytree(evaluated[2], out)
    monkeypatch.chdir(place)
    kept = watch(monkeypatch)
    assert keylayers("eval", *ALL, "--output", out) == 0
    changed = {"five", "written", "rolling"}  # the tasks that read the file
    record = json.loads((out / "evaluation.json").read_text())
    again = {one["pair"]: one["task"] for one in record["provenance"]["pairs"]}
    assert sorted(again[key] for key in kept) == sorted([*changed] * 4)
    later = pd.read_parquet(out / "documents.parquet")  # has what was measured before, too
    assert set(table["pair"]) < set(later["pair"])
    assert set(later["model"]) == set(NAMES)
