# SPDX-License-Identifier: Apache-2.0
"""What the tests of evaluations measure: task files, and a folder with models, tasks and data."""

import json

from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter

from keylayers.evaluation.measures import FORMAT, Evaluation
from tiny_files import ANIMALS, FOODS, tiny_model, tiny_tokenizer, write_rows

CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
task: written
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[right]}}"
generation_kwargs: {max_gen_toks: 2, until: ["."], do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: rolling
output_type: loglikelihood_rolling
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


def write_documents(path, questions, choices):
    """Questions with a right answer each; gives a task file's lines about them."""
    rows = [
        {"question": question, "choices": own, "right": index % len(own)}
        for index, (question, own) in enumerate(zip(questions, choices, strict=True))
    ]
    write_rows(path, rows)
    where = f"dataset_kwargs: {{data_files: {{test: {path}}}}}"
    return f"dataset_path: json\ntest_split: test\n{where}\n"


def write_tasks(folder):
    """Task files: `foods`, a group of two multiple-choice tasks, `written` and `rolling`."""
    folder.mkdir()
    for name, num_choices, num in (("three", 3, 9), ("five", 5, 6)):
        foods = [[FOODS[(first + i) % 8] for i in range(num_choices)] for first in range(num)]
        questions = [f"The {ANIMALS[index % 8]} {index} eats" for index in range(num)]
        files = write_documents(folder / f"{name}.jsonl", questions, foods)
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}{CHOICE}")
    (folder / "written.yaml").write_text(WRITTEN + files)
    (folder / "rolling.yaml").write_text(ROLLING + files)
    (folder / "fixed.yaml").write_text(f"task: fixed\nnum_fewshot: 0\n{files}{CHOICE}")
    broken = CHOICE.replace("{{question}}", "{{no_such_field}}")
    (folder / "broken.yaml").write_text(f"task: broken\n{files}{broken}")
    (folder / "gone.yaml").write_text(f"task: gone\n{files.replace('five', 'gone')}{CHOICE}")
    (folder / "foods.yaml").write_text(GROUP)


def write_place(tiny, folder):
    """All that is evaluated: model, two adapters, a checkpoint, tasks, data."""
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
    write_broken(folder)
    write_tasks(folder / "tasks")
    (folder / "known.txt").write_text(" ".join(f"The {one} eats." for one in ANIMALS * 6))


def write_broken(folder):
    """A model that gives NaN, and one whose tokenizer has tokens without embeddings."""
    model, tokenizer = tiny_model(len(tiny_tokenizer())), tiny_tokenizer()
    tokenizer.add_tokens([f"{one[-1]} eat" for one in (*ANIMALS, *FOODS)])
    for name, saved in (("no_row", tokenizer), ("nan", tiny_tokenizer())):
        model.save_pretrained(folder / name)
        saved.save_pretrained(folder / name)
        model.lm_head.weight.data[3] = float("nan")


MODELS = ["--model", "model", "--adapter", "adapter", "other", "--checkpoint", "tuned"]
TASKS = ["--task-folder", "tasks", "--tasks", "foods,written", "rolling"]
LOSSES = ["--data", "data.jsonl", "--forgetting-data", "known.txt", "--max-length", "32"]
ALL = [*MODELS, *TASKS, *LOSSES]
NAMES = ["base model", "adapter", "other", "tuned"]


def evaluation_of(folder):
    """The evaluation that a folder, or a file, holds."""
    path = folder / "evaluation.json" if folder.is_dir() else folder
    content = json.loads(path.read_text())
    assert content.pop("format") == FORMAT
    return TypeAdapter(Evaluation).validate_python(content)
