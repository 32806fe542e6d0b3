# SPDX-License-Identifier: Apache-2.0
"""`keylayers eval` from options to files, on a tiny model, two adapters and a checkpoint."""

import json
import math
import re
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from test_rank import keylayers
from tiny_files import ANIMALS, FOODS, tiny_model, tiny_tokenizer

CHOICE = """
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
task: written
dataset_path: json
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[right]}}"
generation_kwargs: {max_gen_toks: 2, until: ["."], do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling
dataset_path: json
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""
GROUP = """
group: foods
task: [three, five]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
  - {metric: acc_norm, weight_by_size: false}
"""


def write_tasks(folder):
    """Task files: `foods`, a group of two multiple-choice tasks, `written` and `rolling`."""
    folder.mkdir()
    for name, num_choices, num in (("three", 3, 9), ("five", 5, 6)):
        rows = [
            {
                "question": f"The {ANIMALS[index % 8]} {index} eats",
                "choices": [FOODS[(index + place) % 8] for place in range(num_choices)],
                "right": index % num_choices,
            }
            for index in range(num)
        ]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{CHOICE}")
    (folder / "written.yaml").write_text(WRITTEN + files)
    (folder / "rolling.yaml").write_text(ROLLING + files)
    (folder / "fixed.yaml").write_text(f"task: fixed\nnum_fewshot: 0\n{files}{CHOICE}")
    broken = CHOICE.replace("{{question}}", "{{no_such_field}}")
    (folder / "broken.yaml").write_text(f"task: broken\n{files}{broken}")
    (folder / "gone.yaml").write_text(f"task: gone\n{files.replace('five', 'gone')}{CHOICE}")
    (folder / "foods.yaml").write_text(GROUP)


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with all that is evaluated: model, two adapters, a checkpoint, tasks, data."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("eval")
    for name in ("model", "tuned", "adapter", "data.jsonl"):
        (folder / name).symlink_to(tiny / name)
    tiny_tokenizer().save_pretrained(folder / "tuned")
    other = get_peft_model(
        tiny_model(len(tiny_tokenizer())),
        # a head that the adapter holds whole: PEFT's own `unload` would leave it in the base model
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    other.base_model.model.lm_head.modules_to_save["default"].weight.data *= -1
    other.save_pretrained(folder / "other")
    write_tasks(folder / "tasks")
    (folder / "known.txt").write_text(" ".join(f"The {one} eats." for one in ANIMALS * 6))
    problems = [{"problem": f"What is {n} + 1?", "answer": n + 1} for n in range(3)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    return folder


MODELS = ["--model", "model", "--adapter", "adapter", "other", "--checkpoint", "tuned"]
TASKS = ["--task-folder", "tasks", "--tasks", "foods,written", "rolling"]
LOSSES = ["--data", "data.jsonl", "--forgetting-data", "known.txt", "--max-length", "32"]
PROBLEMS = ["--problems", "sums.jsonl", "--samples", "4", "--max-new-tokens", "4"]
ALL = [*MODELS, *TASKS, *LOSSES, *PROBLEMS]
NAMES = ["base model", "adapter", "other", "tuned"]


@pytest.fixture(scope="module")
def evaluated(place):
    """The whole evaluation, and what it printed."""
    from contextlib import chdir, redirect_stderr, redirect_stdout

    from keylayers.evaluation.record import Evaluation

    out, err = StringIO(), StringIO()
    with chdir(place), redirect_stdout(out), redirect_stderr(err):
        assert keylayers("eval", *ALL, "--output", "out") == 0, err.getvalue()
    return Evaluation.load(place / "out"), out.getvalue(), err.getvalue()


def measure(found, task, metric):
    (one,) = [one for one in found.measures if (one.task, one.metric) == (task, metric)]
    return one


def values(found, task, metric):
    return {one.model: one.value for one in measure(found, task, metric).results}


@pytest.fixture(scope="module")
def by_the_harness(place):
    """What lm-evaluation-harness itself says of two models, loaded in its own way."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    sources = {
        "base model": f"pretrained={place}/model",
        "other": f"pretrained={place}/model,peft={place}/other",
    }
    return {
        name: lm_eval.simple_evaluate(
            model="hf",
            model_args=f"{arguments},dtype=float32",
            tasks=["foods", "written", "rolling"],
            task_manager=manager,
            device="cpu",
            batch_size=3,
            bootstrap_iters=0,
        )["results"]
        for name, arguments in sources.items()
    }


def test_every_number_is_that_of_the_harness(evaluated, by_the_harness):
    found, _, _ = evaluated
    compared = 0
    for task, metric in (
        *(("foods", "acc"), ("foods", "acc_norm"), ("three", "acc"), ("five", "acc_norm")),
        *(("written", "exact_match"), ("rolling", "word_perplexity")),
    ):
        found_values = values(found, task, metric)
        for model, results in by_the_harness.items():
            own = results[task][f"{metric},none"]
            assert found_values[model] == pytest.approx(own, rel=1e-4), (task, metric, model)
            compared += 1
    assert compared == 12
    assert len(set(values(found, "rolling", "word_perplexity").values())) == 4


def test_a_loss_is_that_of_transformers_on_each_model_by_itself(evaluated, place):
    """On the base after both adapters were on it, too: it is measured first and hashed after."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from keylayers.options import DataOptions
    from keylayers.training.data import prepare

    data = DataOptions(data=str(place / "data.jsonl"), max_length=32)
    held_out = prepare(data, tiny_tokenizer(), 64).held_out  # as `rank` and `train` split it
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


def test_differences_are_taken_document_by_document(evaluated, place):
    found, _, _ = evaluated
    table = pd.read_parquet(place / "out" / "documents.parquet")
    rows = table[(table["task"] == "forgetting") & (table["metric"] == "loss")]
    wide = rows.pivot(index="document", columns="model", values="value")
    sizes = rows[rows["model"] == "base model"].set_index("document")["size"]
    for result in measure(found, "forgetting", "loss").results[1:]:
        against = [one.against for one in result.differences]
        assert against == (
            ["base model"] if result.model == "adapter" else ["base model", "adapter"]
        )
        for one in result.differences:
            own = (wide[result.model] - wide[one.against]).sum() / sizes.sum()
            assert one.value == pytest.approx(own)
            assert one.interval.low <= one.value <= one.interval.high
    known = {"held-out data", "forgetting", "three", "five", "written", "sums"}
    assert set(table["task"]) == known
    assert set(table["model"]) == set(NAMES)


def test_chance_is_known_document_by_document(evaluated):
    found, _, _ = evaluated
    assert measure(found, "three", "acc").chance == pytest.approx(1 / 3)
    assert measure(found, "foods", "acc").chance == pytest.approx((9 / 3 + 6 / 5) / 15)
    assert measure(found, "foods", "acc_norm").chance == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert measure(found, "written", "exact_match").chance is None
    assert measure(found, "rolling", "word_perplexity").chance is None


def test_the_table_says_what_is_noise(evaluated):
    _, shown, _ = evaluated
    assert "foods, acc" in shown
    assert "15 documents, chance 0.280" in shown
    assert "not above chance" in shown
    assert "no difference shown" in shown
    assert "against base model" in shown
    assert "against adapter" in shown
    assert "no interval" in shown  # of the perplexity, which is no mean over documents
    assert "by chance alone" in shown
    assert "Holm's correction" in shown
    assert "fewer than 30 documents" in shown
    assert "Problems solved with more samples" in shown
    assert "give no answer" in shown


def test_gain_stands_beside_forgetting(evaluated):
    _, shown, _ = evaluated
    gain = shown.index("held-out data, nats per token")
    assert gain < shown.index("forgetting, nats per token") < shown.index("foods, acc")


def test_what_is_recorded_says_how_it_came_about(evaluated):
    found, _, _ = evaluated
    made = found.provenance
    assert made["options"]["tasks"] == ["foods", "written", "rolling"]
    assert made["environment"]["evaluation_libraries"]["lm_eval"]
    assert list(found.models) == NAMES
    assert found.reference == "adapter"
    assert (
        len({one["weights_sha256"] for one in (found.models[n] for n in ("base model", "tuned"))})
        == 2
    )
    assert found.models["adapter"]["adapter_sha256"] != found.models["other"]["adapter_sha256"]
    assert len(made["pairs"]) == 4 * 7
    assert len({one["pair"] for one in made["pairs"]}) == 28
    assert {one["inputs_sha256"] for one in made["pairs"] if one["task"] == "three"}
    assert made["inputs"]["held-out data"]["content_sha256"]


def test_problems_are_counted_by_samples(evaluated, place):
    found, _, _ = evaluated
    assert set(values(found, "sums", "pass@4")) == set(NAMES)
    shown = {one.metric for one in found.measures if one.task == "sums" and one.is_in_table}
    assert shown == {"pass@1", "majority@4"}
    files = sorted((place / "out" / "samples").iterdir())
    assert len(files) == 4
    for path in files:
        assert len(path.read_text().splitlines()) == 1 + 3 * 4
    facts = [one["facts"] for one in found.provenance["pairs"] if one["task"] == "sums"]
    assert all(one["num_samples"] == 12 for one in facts)
    assert sum(one["num_unanswered"] for one in facts) > 0


def test_the_same_again_measures_nothing(evaluated, place, monkeypatch, capsys):
    from keylayers.evaluation.record import Evaluation
    from keylayers.runs import eval_jobs

    def refuse(self, loaded, progress):
        raise AssertionError(f"{self.name} is measured again")

    for kind in (eval_jobs.TaskJob, eval_jobs.LossJob, eval_jobs.ProblemJob):
        monkeypatch.setattr(kind, "run", refuse)
    monkeypatch.chdir(place)
    before = (place / "out" / "documents.parquet").read_bytes()
    assert keylayers("eval", *ALL, "--output", "out") == 0
    assert "tuned: all measured before" in capsys.readouterr().err
    assert (place / "out" / "documents.parquet").read_bytes() == before
    assert Evaluation.load("out").measures == evaluated[0].measures


class Stop:
    """Raises what Ctrl-C raises when pair number `at` is to be measured; counts those before."""

    def __init__(self, monkeypatch, at=None):
        from keylayers.evaluation.documents import Store

        self.kept = []
        put = Store.put

        def counted(store, key, found):
            if len(self.kept) == at:
                raise KeyboardInterrupt
            self.kept.append(key)
            put(store, key, found)

        monkeypatch.setattr(Store, "put", counted)


def test_a_run_that_was_stopped_goes_on(evaluated, place, tmp_path, monkeypatch):
    """At several places; nothing that was finished is measured twice, and the end is the same."""
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    kept = []
    for at in (4, 11, None):
        with monkeypatch.context() as patched:
            stop = Stop(patched, at)
            code = keylayers("eval", *ALL, "--output", out)
        assert code == (0 if at is None else 130)
        assert at is None or not (out / "evaluation.json").exists()
        kept += stop.kept
    assert len(kept) == len(set(kept)) == 28
    name = "documents.parquet"
    pd.testing.assert_frame_equal(
        pd.read_parquet(out / name), pd.read_parquet(place / "out" / name)
    )
    whole, broken = (
        json.loads((one / "evaluation.json").read_text()) for one in (place / "out", out)
    )
    for one in (whole, broken):
        del one["provenance"]["environment"]  # the commit may change while tests run
    assert whole["provenance"] == broken["provenance"]
    assert whole == broken
    assert not list(tmp_path.glob(".*"))
    assert not list(out.glob(".*"))


def test_what_changes_is_measured_anew_and_the_rest_is_not(evaluated, place, tmp_path, monkeypatch):
    import shutil

    monkeypatch.chdir(place)
    out = tmp_path / "out"
    shutil.copytree(place / "out", out)
    task = (place / "tasks" / "five.jsonl").read_text()
    try:
        (place / "tasks" / "five.jsonl").write_text(task.replace("eats", "likes", 1))
        stop = Stop(monkeypatch)
        assert keylayers("eval", *ALL, "--output", out) == 0
    finally:
        (place / "tasks" / "five.jsonl").write_text(task)
    changed = {"five", "written", "rolling"}  # the tasks that read the file
    record = json.loads((out / "evaluation.json").read_text())
    again = {one["pair"]: one["task"] for one in record["provenance"]["pairs"]}
    assert sorted(again[key] for key in stop.kept) == sorted([*changed] * 4)


def test_a_chat_template_and_examples_are_part_of_the_prompt(place, tmp_path, monkeypatch, capsys):
    """The prompts that the harness logs, as the model is asked."""
    monkeypatch.chdir(place)
    seen = []
    from keylayers.evaluation import benchmarks

    evaluate = benchmarks.lm_eval.evaluate

    def spy(**kwargs):
        found = evaluate(**kwargs)
        (samples,) = found["samples"].values()
        seen.append(samples[0]["arguments"][0][0])
        return found

    monkeypatch.setattr(benchmarks.lm_eval, "evaluate", spy)
    tasks = ["--task-folder", "tasks", "--tasks", "three", "fixed", "--limit", "2"]
    arguments = ["--model", "model", *tasks]
    arguments += ["--num-fewshot", "1", "--apply-chat-template", "--chat-template", "alpaca"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 0
    assert seen[0].count("### Instruction:") == 2
    assert seen[0].endswith("### Response:\n")
    assert seen[1].count("### Instruction:") == 1
    shown = capsys.readouterr().out
    assert "base model, fixed: 0 examples in each prompt, for the task file fixes" in shown


def test_the_base_model_is_the_same_after_each_adapter(place):
    from keylayers.evaluation.subjects import each_model, subjects_of
    from keylayers.options import ModelOptions
    from keylayers.options.evaluation import ComparedOptions
    from keylayers.weights import weights_sha256

    source = ModelOptions(model=str(place / "model"))
    compared = ComparedOptions(adapter=(str(place / "other"), str(place / "adapter")))
    hashes = []
    for loaded in each_model(subjects_of(source, compared), source, None):
        if loaded.subject.kind == "base":
            model, names = loaded.model, [name for name, _ in loaded.model.named_modules()]
        hashes.append(loaded.sha256)
    assert weights_sha256(model) == loaded_hash(place)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert len(set(hashes)) == 3


def loaded_hash(place):
    from keylayers.models import load_model
    from keylayers.options import ModelOptions
    from keylayers.weights import weights_sha256

    return weights_sha256(load_model(ModelOptions(model=str(place / "model"))))


def test_names_tell_models_apart(tmp_path):
    from keylayers.evaluation.subjects import subjects_of
    from keylayers.options import ModelOptions
    from keylayers.options.evaluation import ComparedOptions

    def names(*sources):
        compared = ComparedOptions(adapter=sources)
        return [one.name for one in subjects_of(ModelOptions(model="m"), compared)]

    assert names("runs/a", "runs/b") == ["base model", "a", "b"]
    assert names("a/out", "b/out") == ["base model", "a/out", "b/out"]
    assert names("owner/model", "x/base model") == ["base model", "owner/model", "x/base model"]


ONE = ["--model", "model"]
BAD = [
    (ONE, "something must be measured"),
    ([*ONE, "--tasks", "three", "--task-folder", "none"], "there is no 'none'"),
    ([*ONE, "--task-folder", "tasks", "--tasks", "broken"], "'no_such_field' is undefined"),
    (
        [*ONE, "--task-folder", "tasks", "--tasks", "gone"],
        "must be in order and their documents in",
    ),
    ([*ONE, "--tasks", "three", "--limit", "0"], "`limit` must be at least 1"),
    ([*ONE, "--tasks", "three", "--towers", "all"], "`towers` must be left out"),
    ([*ONE, "--data", "data.jsonl", "--num-fewshot", "2"], "`num_fewshot` must be left out"),
    ([*ONE, "--data", "none.jsonl"], "`data` must be a file"),
    ([*ONE, "--data", "data.jsonl", "--limit", "3"], "`limit` must be left out"),
    ([*ONE, "--forgetting-data", "none.txt"], "must be a readable text"),
    ([*ONE, "--problems", "sums.jsonl", "./sums.jsonl"], "two are 'sums'"),
    ([*ONE, "--problems", "gsm8", "--samples", "2"], "did you mean 'gsm8k'"),
    ([*ONE, "--problems", "sums.jsonl", "--samples", "2", "--temperature", "0"], "above 0"),
    ([*ONE, "--forgetting-data", "known.txt", "--held-out", "3"], "`held_out` must be left out"),
    (
        [*MODELS, "--tasks", "three", "--reference", "base"],
        "`reference` must be one of the adapters",
    ),
    (["--model", "model", "--adapter", "a", "a", "--tasks", "x"], "'a' twice"),
    (["--model", "model", "--adapter", "none/here/x", "--data", "data.jsonl"], "no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    assert keylayers("eval", *arguments, "--output", out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("keylayers: ")
    assert message in error
    assert not (out / "evaluation.json").exists()


def test_a_model_with_another_tokenizer_is_not_compared_by_losses(
    place, tmp_path, monkeypatch, capsys
):
    from transformers import AutoTokenizer

    (tmp_path / "tuned").mkdir()
    for path in (place / "tuned").iterdir():
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(place / "tuned")
    tokenizer.add_tokens([f"{one[-1]} eat" for one in (*ANIMALS, *FOODS)])
    tokenizer.save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(place)
    arguments = [*ONE, "--checkpoint", tmp_path / "tuned", "--data", "data.jsonl"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert "only between models of one tokenizer" in capsys.readouterr().err


def test_a_missing_library_is_one_line(place, tmp_path, monkeypatch, capsys):
    from keylayers.runs import eval_jobs

    monkeypatch.chdir(place)
    monkeypatch.setattr(eval_jobs, "find_spec", lambda name: None)
    arguments = [*ONE, "--task-folder", "tasks", "--tasks", "three", "--output", tmp_path / "out"]
    assert keylayers("eval", *arguments) == 2
    assert "pip install 'keylayers[eval]'" in capsys.readouterr().err


def test_a_model_that_gives_nan_is_one_line(place, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    monkeypatch.chdir(place)
    arguments = ["--model", tmp_path / "broken", "--forgetting-data", "known.txt"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert "gives NaN or infinity on forgetting" in capsys.readouterr().err


def test_documents_that_only_some_models_have_give_no_interval():
    """As where a task leaves out answers that it cannot score."""
    from keylayers.evaluation.documents import Measured
    from keylayers.evaluation.measures import Part, measures_of

    def of(num):
        rows = pd.DataFrame(
            {
                "task": "t",
                "metric": "f1",
                "document": range(num),
                "document_sha256": "x",
                "value": 0.5,
                "size": 1.0,
                "chance": math.nan,
            }
        )
        return {"t": Measured("t", rows, {"f1": 0.5}, {"f1": True})}

    (same,) = measures_of(Part("t", ("t",)), {"base model": of(9), "a": of(9)}, None, 0)
    assert same.num_documents == 9
    assert same.results[1].differences[0].interval is not None
    (other,) = measures_of(Part("t", ("t",)), {"base model": of(9), "a": of(8)}, None, 0)
    assert other.results[1].differences[0].interval is None
    groups = Part("g", ("t",), is_group=True)
    assert not list(measures_of(groups, {"base model": of(9), "a": of(8)}, None, 0))


def test_a_damaged_file_of_results_is_one_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (tmp_path / "documents.parquet").write_text("not a table")
    arguments = [*ONE, "--forgetting-data", "known.txt", "--output", tmp_path]
    assert keylayers("eval", *arguments) == 2
    assert "must be a file that `keylayers eval` wrote" in capsys.readouterr().err
    assert (tmp_path / "documents.parquet").read_text() == "not a table"


def test_training_on_another_split_is_said(place, tmp_path, monkeypatch, capsys):
    """Then the adapter may have seen what counts as held out here."""
    import shutil

    monkeypatch.chdir(place)
    out = tmp_path / "rank"
    data = ["--model", "model", "--data", "data.jsonl", "--max-length", "32", "--held-out", "5"]
    small = ["--max-steps", "2", "--batch-size", "4", "--mask-batches", "1"]
    assert keylayers("rank", *data, *small, "--output", out) == 0
    arguments = ["--adapter", out / "adapter", "--output", tmp_path / "one"]
    assert keylayers("eval", *data, *arguments) == 0
    assert "another split" not in capsys.readouterr().out
    arguments[-1] = tmp_path / "two"
    assert keylayers("eval", *data[:-1], "7", *arguments) == 0
    assert "adapter was trained on other data or another split" in capsys.readouterr().out
    shutil.rmtree(out)


def test_a_rate_of_no_spread_is_said_to_be_the_same():
    from keylayers.evaluation.measures import Difference, Measure, Result
    from keylayers.evaluation.statistics import Interval
    from keylayers.report.evaluation import chance_words, difference_words

    same = Difference("base model", 0.0, Interval(0.0, 0.0, "bootstrap"), 1.0, 1.0)
    result = Result("a", 0.1, Interval(0.02, 0.2, "exact"), (same,))
    one = Measure("t", "acc", 50, 0.25, True, (result,))
    assert difference_words(one, same) == "the same on each"
    assert chance_words(one, result) == "below chance"
    worse = Difference("base model", -0.1, Interval(-0.2, -0.05, "bootstrap"), 0.01, 0.01)
    assert difference_words(one, worse) == "worse"
    loss = Measure("t", "loss", 50, None, False, (result,))
    assert difference_words(loss, worse) == "better"


RECORD = Path(__file__).resolve().parents[1] / "experiments"


def rendered(found, width):
    """The lines of the report as a terminal of this width shows them."""
    from keylayers.report.evaluation import evaluation_report

    console = Console(file=StringIO(), width=width)
    console.print(evaluation_report(found))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def recorded():
    from keylayers.evaluation.record import Evaluation

    return Evaluation.load(RECORD / "records" / "evaluation_english_2m_mmlu.json")


def test_the_log_shows_what_the_record_holds():
    entry = (RECORD / "LOG.md").read_text().split("## 2026-11-25: two adapters of the 2 M model")[1]
    shown = entry.split("```")[1].strip("\n").splitlines()
    assert len(shown) > 30
    assert set(shown) <= set(rendered(recorded(), 120))


def test_a_narrow_terminal_breaks_no_interval():
    wide, narrow = ("\n".join(rendered(recorded(), width)) for width in (120, 80))
    intervals = re.compile(r"\[[-+]?\d\.\d+, [-+]?\d\.\d+\]")
    assert len(intervals.findall(wide)) > 40
    assert sorted(intervals.findall(narrow)) == sorted(intervals.findall(wide))


def test_names_are_no_markup(tmp_path):
    from keylayers.evaluation.record import Evaluation

    text = json.dumps(recorded().to_json()).replace("alpaca-all", "[red]x[/y]")
    (tmp_path / "evaluation.json").write_text(text)
    lines = rendered(Evaluation.load(tmp_path), 140)
    assert any("against [red]x[/y]" in line for line in lines)
    assert any(line.startswith("  [red]x[/y]") for line in lines)
