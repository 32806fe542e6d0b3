# SPDX-License-Identifier: Apache-2.0
"""Benchmarks by lm-evaluation-harness: its own tasks, or those of a local task folder.

The harness builds the prompts, runs the model and scores the answers; we keep the scores of each
document. Needs the extra `eval`; this file is imported only if benchmarks are asked for.
"""

import contextlib
import functools
import inspect
import logging
import math
import random
from collections.abc import Iterator, Mapping
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
from keylayers.evaluation.measures import Part, metric_name
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


MANY_TASKS = 10  # the table leaves out the tasks of groups that have more


def load_benchmarks(options: BenchmarkOptions, seed: int) -> tuple[list["Benchmark"], list[Part]]:
    """The tasks that the options name, with their documents, and the measures they make.

    The harness's own tasks, which are thousands, are searched only if a name is not in the folder.

    Raises:
        ConfigError: there is no such task, or it cannot be run.
        DataError: a task cannot be built, or its documents cannot be reached.
    """
    manager = _manager(options)
    try:
        with quiet_datasets(), _Warnings():
            loaded = manager.load(list(options.tasks))
    except FROM_A_BAD_TASK as error:
        raise DataError(
            f"the tasks {', '.join(options.tasks)} must be valid and their documents available, "
            f"but the harness said: {_reason(error)}"
        ) from error
    tasks = loaded["tasks"]
    for name, task in tasks.items():
        _check(name, task, options)
        # The harness's own rule: a task that sets 0 keeps it.
        fixed = task.get_config("num_fewshot")
        if fixed is None or (options.num_fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
    benchmarks = [Benchmark(name, task, options, seed) for name, task in tasks.items()]
    return benchmarks, _parts(tasks, loaded.get("groups", {}))


def _parts(tasks: Mapping[str, Any], groups: Mapping[str, Any]) -> list[Part]:
    """Groups with their members below them, then the tasks that are in no group."""
    by_name = {group.name: group for group in groups.values()}
    inner = {member for group in by_name.values() for member in group.child_names}
    outer = [group for name, group in by_name.items() if name not in inner]
    parts = [part for group in outer for part in _group_parts(group, by_name, 0)]
    alone = set(tasks) - {part.name for part in parts}
    return [*parts, *(Part(name, (name,)) for name in tasks if name in alone)]


def _group_parts(group: Any, by_name: Mapping[str, Any], depth: int) -> Iterator[Part]:
    leaves = tuple(task.task_name for task in group.get_all_tasks())
    averaged = group.aggregate_metric_list or ()
    for metric in averaged:
        yield Part(
            group.name,
            leaves,
            is_by_size=bool(metric.weight_by_size),
            metric=metric.metric,
            filters=None if metric.filter_list is None else tuple(metric.filter_list),
            depth=depth,
            is_group=True,
        )
    inner = depth + bool(averaged)
    for member in group.child_names:
        if member in by_name:
            yield from _group_parts(by_name[member], by_name, inner)
        else:
            is_in_table = not averaged or len(leaves) <= MANY_TASKS
            yield Part(member, (member,), depth=inner, is_in_table=is_in_table)


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


class HarnessModel(HFLM):
    """A model as the harness takes it; counts passes and prompts that lose their beginning."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        with _Warnings():
            super().__init__(
                pretrained=loaded.model,
                tokenizer=loaded.chat_tokenizer(),
                batch_size=batch_size,
                max_batch_size=batch_size,
            )
        to_evaluation(loaded.model)  # again, after the harness's own way
        self.on_step: OnStep = lambda step, loss: None
        self.num_passes = 0
        self.num_cut = 0

    # The harness draws its own bars on top of ours, whatever TQDM_DISABLE says.
    loglikelihood = functools.partialmethod(HFLM.loglikelihood, disable_tqdm=True)
    loglikelihood_rolling = functools.partialmethod(HFLM.loglikelihood_rolling, disable_tqdm=True)
    generate_until = functools.partialmethod(HFLM.generate_until, disable_tqdm=True)

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a batch, and count the prompts that are cut: the harness warns once a batch."""
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.num_cut += int((mask.sum(dim=1) > left_truncate_len).sum())
            tokens, mask = tokens[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return tokens, mask

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        # lm_eval 0.4.13 asks for a bar here in `loglikelihood_rolling`
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


@dataclass(frozen=True)
class Benchmark:
    """One task of the harness, with its documents."""

    name: str
    task: Any
    options: BenchmarkOptions
    seed: int

    def record(self) -> dict[str, Any]:
        """The version that the task file states."""
        about = self.task.get_config("metadata") or {}
        return {"kind": "benchmark", "version": about.get("version")}

    def inputs_sha256(self, model: HarnessModel) -> str:
        """The hash of all that decides the result except the model.

        Raises:
            DataError: the task file does not fit its documents.
        """
        self._set_seeds()
        options, task = self.options, self.task
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
                f"the task {self.name!r} must give a prompt for each of its documents, but the "
                f"harness said: {_reason(error)}"
            ) from error
        config = {key: _said(value) for key, value in task.dump_config().items() if key in SCORING}
        requests = [[request.doc_id, request.idx, str(request.args)] for request in task.instances]
        documents = [str(doc) for _, doc in task.doc_iterator(limit=options.limit)]
        return json_sha256([lm_eval.__version__, str(config), requests, documents])

    def measured(self, model: HarnessModel, on_step: OnStep) -> Measured:
        """One model on this task."""
        self._set_seeds()
        options, name = self.options, self.name
        model.num_cut, model.num_passes, model.on_step = 0, 0, on_step
        warnings = _Warnings()
        with warnings, quiet_datasets(), torch.no_grad():
            found = lm_eval.evaluate(
                lm=model,
                task_dict={"tasks": {name: self.task}, "groups": {}},
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
        said = [
            f"{metric} is not finite, and left out" for metric in all_totals if metric not in totals
        ]
        num_fewshot = self.task.get_config("num_fewshot")
        if options.num_fewshot not in (None, num_fewshot):
            said.append(f"{num_fewshot} examples in each prompt: the task file fixes the number")
        rows = pd.DataFrame(
            [row for sample in found["samples"][name] for row in self._rows(sample)],
            columns=["task", "metric", "document", "document_sha256", "value", "size", "chance"],
        )
        means = rows.groupby("metric", sort=False)["value"].mean()
        is_mean = [
            metric
            for metric in totals
            if metric in means and math.isclose(means[metric], totals[metric])
        ]
        directions = found["higher_is_better"].get(name, {})
        return Measured(
            task=name,
            rows=rows[rows["metric"].isin(is_mean)].reset_index(drop=True),
            totals=totals,
            higher_is_better={metric: directions.get(metric.split(" (")[0]) for metric in totals},
            facts={
                "num_fewshot": num_fewshot,
                "num_cut_prompts": model.num_cut + warnings.num_cut,
                "warnings": [*warnings.others, *said],
            },
        )

    def _set_seeds(self) -> None:
        """Seed every generator that a task may use, as `lm_eval.simple_evaluate` does."""
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        self.task.set_fewshot_seed(seed=self.seed)

    def _rows(self, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for metric in sample["metrics"]:
            if not isinstance(sample[metric], Real) or not math.isfinite(sample[metric]):
                continue  # part of a metric that is not a mean over documents
            yield {
                "task": self.name,
                "metric": metric_name(metric, sample["filter"]),
                "document": int(sample["doc_id"]),
                "document_sha256": sample["doc_hash"][:16],
                "value": float(sample[metric]),
                "size": 1.0,
                "chance": _chance(self.task, metric, sample),
            }


def _said(value: Any) -> Any:
    """The value with each function replaced by its source: `str` gives an address in memory."""
    if isinstance(value, dict):
        return {key: _said(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(part) for part in value]
    if isinstance(value, functools.partial):
        return [_said(value.func), _said(value.args), _said(value.keywords)]
    if not callable(value):
        return value
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # built in, or made by a call
        return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__name__)}"


def _chance(task: Any, metric: str, sample: dict[str, Any]) -> float:
    """How often a guess is right; NaN where that is not known."""
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice" or metric not in OF_CHOICES:
        return math.nan
    target = sample["target"]
    num_right = len(set(target)) if isinstance(target, list) else 1
    return num_right / len(task.doc_to_choice(sample["doc"]))


class _Warnings(logging.Handler, contextlib.AbstractContextManager["_Warnings"]):
    """Collects what the harness logs: a count of cut prompts, and the other warnings."""

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
