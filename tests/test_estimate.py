# SPDX-License-Identifier: Apache-2.0
"""What a dry run foresees, against counts by hand and against what was measured."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Model -> its parameters in 1e9, as its own page says.
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6.74,
    "meta-llama/Llama-3.1-8B": 8.03,
    "mistralai/Mistral-7B-v0.1": 7.24,
}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_a_known_model_has_its_published_size(name, billions):
    from keylayers.commands.study.sizes import KNOWN_MODELS, model_shape

    assert set(KNOWN_MODELS) == set(PUBLISHED)
    assert model_shape(name).num_parameters / 1e9 == pytest.approx(billions, abs=0.005)


def test_the_shape_of_a_model_on_disk_is_that_of_the_model(tiny):
    from transformers import AutoModelForCausalLM

    from keylayers.commands.study.sizes import model_shape
    from keylayers.model.modules import map_modules

    shape = model_shape(str(tiny / "model"))
    modules = list(map_modules(AutoModelForCausalLM.from_pretrained(tiny / "model")))
    assert shape.num_modules == len(modules)
    assert shape.num_module_parameters == sum(one.num_parameters for one in modules)
    ranked = shape.ranking({}).modules
    assert [(one.name, one.num_parameters) for one in ranked] == [
        (one.name, one.num_parameters) for one in modules
    ]


def test_another_architecture_is_not_known(tmp_path):
    from keylayers.commands.study.sizes import model_shape

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert model_shape(str(tmp_path)) is None
    assert model_shape("somebody/something") is None


CASES = json.loads((ROOT / "benchmarks" / "memory_budget.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['vocabulary']} {case['update']}")
def test_memory_is_what_the_benchmark_measured(case):
    """Its budgets lie at a fifth and four fifths of the way from one module to all."""
    from keylayers.commands.study.estimate_memory import step_bytes
    from keylayers.commands.study.sizes import ModelShape
    from keylayers.model.options import ModelOptions
    from keylayers.training.options import TrainingOptions

    low, _, high = (one["budget"] for one in case["budgets"])
    measured = high + (high - low) / 3
    shape = ModelShape(8, 512, 1376, 8, 8, 64, case["vocabulary"], 2048)
    tuning = TrainingOptions(
        update=case["update"], lora_rank=8, gradient_checkpointing=case["checkpointed"]
    )
    model = ModelOptions(model="m", dtype="float32")
    assert step_bytes(shape, model, tuning, 4 * 256.0, 1.0) == pytest.approx(measured, rel=0.05)


def test_memory_of_another_shape_is_what_a_step_of_it_holds():
    """The built-in model: other widths, shared keys and values, a tied head."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from keylayers.apply.adapter import add_lora
    from keylayers.commands.study.estimate_memory import step_bytes
    from keylayers.commands.study.sizes import model_shape
    from keylayers.demo.files import BASE
    from keylayers.model.loading import load_model
    from keylayers.model.modules import map_modules
    from keylayers.model.options import ModelOptions
    from keylayers.training.memory import measured_memory
    from keylayers.training.options import TrainingOptions
    from keylayers.training.run import make_trainer

    options, tuning = ModelOptions(model=str(BASE), dtype="float32"), TrainingOptions(batch_size=4)
    model = load_model(options)
    names = [one.name for one in map_modules(model)]
    ids = [[5 + place % 200 for place in range(128)]] * 4
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lora = add_lora(model, names, r=tuning.lora_rank, lora_alpha=tuning.lora_alpha)
    trainer = make_trainer(lora, tokenizer, data, tuning, num_steps=1)
    measured = measured_memory(trainer).of(names)
    foreseen = step_bytes(model_shape(str(BASE)), options, tuning, 4 * 128.0, 1.0)
    assert foreseen == pytest.approx(measured, rel=0.1)


OPTIONS = {"model": "mistralai/Mistral-7B-v0.1", "data": "GAIR/lima", "held_out": 100}


def operations(kind="stage-1", **options):
    from keylayers.commands.study.estimate import estimate
    from keylayers.commands.study.plan import Cell

    return estimate(Cell(kind, "key", (), (), (), {**OPTIONS, **options})).operations


def test_operations_are_those_of_passes_through_the_weights():
    """2 a weight and token forward, 2 back for activations, 2 for the gradient of weights."""
    from keylayers.commands.study.sizes import BYTES_PER_TOKEN, KNOWN_DATA, KNOWN_MODELS

    shape = KNOWN_MODELS[OPTIONS["model"]]
    in_passes = shape.num_module_parameters + shape.vocabulary * shape.hidden_size
    text = KNOWN_DATA[OPTIONS["data"]].mean_bytes / BYTES_PER_TOKEN
    evaluation = 2 * 100 * text * 2 * in_passes
    batches = 50 * 8 * text
    full = 2 * (2 * in_passes + shape.num_module_parameters)
    found = operations(max_steps=50, update="full")
    assert found == pytest.approx(batches * full + evaluation, rel=1e-3)
    lora = operations(max_steps=50)
    assert batches * 4 * in_passes < lora < 1.2 * batches * 4 * in_passes + evaluation
    again = operations(max_steps=50, gradient_checkpointing=True)
    assert again - lora == pytest.approx(batches * 2 * in_passes)


def test_what_costs_more_is_foreseen_to():
    once = operations("training", budget=0.3, steps=50)
    assert once < operations("training", budget=1.0, steps=50)
    assert once < operations("training", budget=0.3, steps=50, controls=["random"])
    assert operations("training", freeze=0.25, steps=50) == operations(
        "training", budget=0.75, steps=50
    )
    assert operations("training", budget="224", steps=50) == operations(
        "training", budget=1.0, steps=50
    )
    ila = operations("ranking", method="ila")
    assert ila > operations("ranking", method="random")
    assert operations("verification", points=5) < operations("verification")
    assert operations("verification") < operations("verification", leave_one_out=True)
    assert operations("ranking", method="leave-one-out") > ila
    assert operations(max_steps=50, max_length=64) < operations(max_steps=50)


def test_what_is_not_known_is_said():
    from keylayers.commands.study.estimate import estimate
    from keylayers.commands.study.plan import Cell

    for options, unknown in (
        ({"model": "somebody/model"}, "the shape of somebody/model"),
        ({"data": "somebody/data"}, "the size of somebody/data"),
    ):
        found = estimate(Cell("stage-1", "key", (), (), (), {**OPTIONS, **options}))
        assert found.operations is None
        assert found.unknown == unknown


def test_sizes_of_data_are_bytes_of_its_lines(tmp_path):
    from keylayers.commands.study.sizes import DataSize, data_size

    row = json.dumps({"text": "\u6f22\u5b57\u2028" * 30}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{row}\n\n{row}\n", encoding="utf-8")
    num_bytes = len(row.encode())
    assert num_bytes > 2 * len(row)
    assert data_size(str(path)) == DataSize(2, float(num_bytes), num_bytes)
    whole = tmp_path / "rows.json"
    whole.write_text(f"[{row}, {row}]", encoding="utf-8")
    assert data_size(str(whole)) == DataSize(2, float(num_bytes), num_bytes)
