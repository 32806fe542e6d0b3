# SPDX-License-Identifier: Apache-2.0
"""Benchmarks by lm-evaluation-harness: its own tasks, or those of a local task folder.

The harness builds the prompts, runs the model and scores the answers; kept are the scores document
by document. Needs the extra `eval`; this file is imported only where benchmarks are asked for.
"""

import contextlib
import functools
import inspect
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pandas as pd
import torch
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from yaml import YAMLError

from keylayers.data.reading import quiet_datasets
from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.evaluation.documents import Measured
from keylayers.evaluation.measures import metric_name
from keylayers.evaluation.options import BenchmarkOptions
from keylayers.evaluation.subjects import Loaded
from keylayers.files import json_sha256
from keylayers.model.preserve import to_evaluation
from keylayers.progress import OnStep

# What decides how an answer is scored; the prompts and documents are hashed as they are.
SCORING = (
    *("output_type", "metric_list", "filter_list", "process_results", "generation_kwargs"),
    *("doc_to_target", "doc_to_choice", "repeats", "num_fewshot"),
)
OF_CHOICES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # a guess is right 1 in n times
# What a task with a bad file, or with data out of reach, raises when it is built.
FROM_A_BAD_TASK = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(datasets.exceptions.DatasetsError, HfHubHTTPError, TemplateError, YAMLError),
)


@dataclass(frozen=True)
class GroupMetric:
    """How a group averages a metric of its tasks."""

    metric: str
    filters: tuple[str, ...] | None
    """None for every filter that the tasks have."""
    is_by_size: bool
    """Whether every document weighs the same, or every task."""


@dataclass(frozen=True)
class TaskGroup:
    """A group of tasks: the names of its members, of all tasks below it, and what it averages."""

    name: str
    members: tuple[str, ...]
    leaves: tuple[str, ...]
    metrics: tuple[GroupMetric, ...]


@dataclass(frozen=True)
class Benchmarks:
    """Tasks by name, and the groups that they stand in."""

    tasks: dict[str, Any]
    groups: tuple[TaskGroup, ...]


def load_benchmarks(options: BenchmarkOptions) -> Benchmarks:
    """The tasks that the options name, with their documents.

    The harness' own thousands of tasks are looked through only if a name is not in the folder.

    Raises:
        ConfigError: no such task, or one that cannot be run.
        DataError: a task cannot be built, or its documents cannot be reached.
    """
    manager = _manager(options)
    try:
        with quiet_datasets(), _Warnings():
            loaded = manager.load(list(options.tasks))
    except FROM_A_BAD_TASK as error:
        raise DataError(
            f"the tasks {', '.join(options.tasks)} must be in order and their documents in reach, "
            f"but the harness said: {_reason(error)}"
        ) from error
    tasks = loaded["tasks"]
    for name, task in tasks.items():
        _check(name, task, options)
        _give_fewshot(task, options)
    return Benchmarks(tasks, tuple(_group(one) for one in loaded.get("groups", {}).values()))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip()


def _manager(options: BenchmarkOptions) -> Any:
    folder = options.task_folder
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"`task_folder` must be a folder of task files (YAML), but there is no {folder!r}"
            )
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(options.tasks) <= set(manager.all_tasks):
            return manager
    with _Warnings():
        manager = TaskManager(include_path=folder)
    for name in options.tasks:
        if name not in manager.all_tasks:
            also = f" or in {folder!r}" if folder is not None else "; give `task_folder` for others"
            raise ConfigError(
                f"every task must be one of lm-evaluation-harness{also}, got {name!r}"
                f"{did_you_mean(name, manager.all_tasks)}"
            )
    return manager


def _check(name: str, task: Any, options: BenchmarkOptions) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not options.run_generated_code:
        raise ConfigError(
            f"the task {name!r} runs code that the model writes; do so in a place where it can do "
            f"no harm, and say `--run-generated-code`"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"tasks must be of text alone, but {name!r} shows images or plays sound")


def _give_fewshot(task: Any, options: BenchmarkOptions) -> None:
    """The number of examples in the prompt, by the harness' own rules: a task's 0 stays."""
    fixed = task.get_config("num_fewshot")
    if fixed is None or (options.num_fewshot is not None and fixed != 0):
        task.set_config(key="num_fewshot", value=options.num_fewshot or 0)


def _group(group: Any) -> TaskGroup:
    return TaskGroup(
        name=group.name,
        members=tuple(group.child_names),
        leaves=tuple(task.task_name for task in group.get_all_tasks()),
        metrics=tuple(
            GroupMetric(
                one.metric,
                None if one.filter_list is None else tuple(one.filter_list),
                bool(one.weight_by_size),
            )
            for one in group.aggregate_metric_list or ()
        ),
    )


class HarnessModel(HFLM):
    """A model as the harness takes it; counts its passes and draws no bars of its own."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        with _Warnings():
            super().__init__(
                pretrained=loaded.model,
                tokenizer=loaded.chat_tokenizer(),
                batch_size=batch_size,
                max_batch_size=batch_size,
            )
        to_evaluation(loaded.model)  # in keylayers' own way, after the harness'
        self.on_step: OnStep = lambda step, loss: None
        self.num_passes = 0
        self.num_cut = 0

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the harness has it, with a count of the prompts that lose their beginning.

        The harness says so once a batch, whatever the number of prompts in it.
        """
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.num_cut += int((mask.sum(dim=1) > left_truncate_len).sum())
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As the harness has it, without a bar."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As the harness has it, without a bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As the harness has it, without a bar."""
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        return super()._loglikelihood_tokens(requests, **(kwargs | {"disable_tqdm": True}))

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        self._count()
        return super()._model_generate(*args, **kwargs)

    def _count(self) -> None:
        self.num_passes += 1
        self.on_step(self.num_passes, None)


def inputs_sha256(
    name: str, task: Any, model: HarnessModel, options: BenchmarkOptions, seed: int
) -> str:
    """The hash of all that decides a task's result but the model: prompts, documents, scoring.

    Raises:
        DataError: the task file does not fit its documents.
    """
    _seed(task, seed)
    template = model.apply_chat_template if options.apply_chat_template else None
    try:
        with _Warnings():
            task.build_all_requests(
                limit=options.limit,
                rank=0,
                world_size=1,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
                chat_template=template,
                tokenizer_name=model.tokenizer_name if template else "",
            )
    except FROM_A_BAD_TASK as error:
        raise DataError(
            f"the task {name!r} must give a prompt for each of its documents, but the harness "
            f"said: {_reason(error)}"
        ) from error
    config = {key: _said(value) for key, value in task.dump_config().items() if key in SCORING}
    requests = [[one.doc_id, one.idx, str(one.args)] for one in task.instances]
    documents = [str(doc) for _, doc in task.doc_iterator(limit=options.limit)]
    return json_sha256([lm_eval.__version__, str(config), requests, documents])


def _said(value: Any) -> Any:
    """The value with each function in it as its source: as text it is a place in memory."""
    if isinstance(value, dict):
        return {key: _said(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(one) for one in value]
    if isinstance(value, functools.partial):
        return [_said(value.func), _said(value.args), _said(value.keywords)]
    if not callable(value):
        return value
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # built in, or made by a call
        return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__name__)}"


def run_benchmark(
    name: str, task: Any, model: HarnessModel, options: BenchmarkOptions, seed: int
) -> Measured:
    """One model on one task.

    Args:
        name: Of the task.
        task: From `load_benchmarks`.
        model: The model.
        options: How many documents, and whether as a chat.
        seed: Of examples in the prompt, and of sampled answers.
    """
    _seed(task, seed)
    model.num_cut, warnings = 0, _Warnings()
    with warnings, quiet_datasets(), torch.no_grad():
        found = lm_eval.evaluate(
            lm=model,
            task_dict={"tasks": {name: task}, "groups": {}},
            limit=options.limit,
            bootstrap_iters=0,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            confirm_run_unsafe_code=options.run_generated_code,
        )
    all_totals = {
        metric_name(*key.split(",", 1)): float(value)
        for key, value in found["results"][name].items()
        if "," in key and "_stderr," not in key and isinstance(value, Real)
    }
    totals = {metric: value for metric, value in all_totals.items() if math.isfinite(value)}
    said = [f"{one} is not finite, and left out" for one in all_totals if one not in totals]
    num_fewshot = task.get_config("num_fewshot")
    if options.num_fewshot not in (None, num_fewshot):
        said.append(f"{num_fewshot} examples in each prompt, for the task file fixes their number")
    rows = pd.DataFrame(
        [row for sample in found["samples"][name] for row in _rows(name, task, sample)],
        columns=["task", "metric", "document", "document_sha256", "value", "size", "chance"],
    )
    means = rows.groupby("metric", sort=False)["value"].mean()
    is_mean = [one for one in totals if one in means and math.isclose(means[one], totals[one])]
    directions = found["higher_is_better"].get(name, {})
    return Measured(
        task=name,
        rows=rows[rows["metric"].isin(is_mean)].reset_index(drop=True),
        totals=totals,
        higher_is_better={one: directions.get(one.split(" (")[0]) for one in totals},
        facts={
            "num_fewshot": num_fewshot,
            "num_cut_prompts": model.num_cut + warnings.num_cut,
            "warnings": [*warnings.others, *said],
        },
    )


def _seed(task: Any, seed: int) -> None:
    """Every generator that a task may draw from, as the harness' own entry does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    task.set_fewshot_seed(seed=seed)


def _rows(name: str, task: Any, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for metric in sample["metrics"]:
        if not isinstance(sample[metric], Real) or not math.isfinite(sample[metric]):
            continue  # a part of what is no mean over documents
        yield {
            "task": name,
            "metric": metric_name(metric, sample["filter"]),
            "document": int(sample["doc_id"]),
            "document_sha256": sample["doc_hash"][:16],
            "value": float(sample[metric]),
            "size": 1.0,
            "chance": _chance(task, metric, sample),
        }


def _chance(task: Any, metric: str, sample: dict[str, Any]) -> float:
    """How often a guess is right; NaN where that is not known."""
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice" or metric not in OF_CHOICES:
        return math.nan
    target = sample["target"]
    num_right = len(set(target)) if isinstance(target, list) else 1
    return num_right / len(task.doc_to_choice(sample["doc"]))


class _Warnings(logging.Handler, contextlib.AbstractContextManager["_Warnings"]):
    """Takes what the harness logs: prompts that were cut are counted, other warnings are kept."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.num_cut = 0
        self.others: list[str] = []
        self._logger = logging.getLogger("lm_eval")

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:200]
        if "runcat" in text:
            self.num_cut += 1
        elif text not in self.others:
            self.others.append(text)

    def __enter__(self) -> "_Warnings":
        self._state = (self._logger.level, self._logger.propagate, self._logger.handlers[:])
        self._logger.handlers[:] = [self]
        self._logger.setLevel(logging.WARNING)
        self._logger.propagate = False
        return self

    def __exit__(self, *exception: object) -> None:
        level, self._logger.propagate, self._logger.handlers[:] = self._state
        self._logger.setLevel(level)
