# SPDX-License-Identifier: Apache-2.0
"""Benchmarks by lm-evaluation-harness: its own tasks, or those of a local task folder.

The harness builds the prompts, runs the model and scores the answers; we keep the scores of each
document. Needs the extra `eval`; this file is imported only if benchmarks are asked for.
"""

import contextlib
import functools
import inspect
import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from numbers import Real
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pandas as pd
import torch
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import set_seed
from yaml import YAMLError

from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.evaluation.documents import COLUMNS, Measured
from keylayers.evaluation.measures import Part, metric_name
from keylayers.evaluation.options import BenchmarkOptions, EvalRunOptions
from keylayers.evaluation.subjects import Loaded
from keylayers.files import json_sha256
from keylayers.model.modules import base_model_of
from keylayers.model.preserve import to_evaluation
from keylayers.progress import OnStep, quiet

OF_CHOICES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # a guess is right 1 in n times
CUT = re.compile("[Tt]runcat")  # in the harness's warning of a prompt that loses its beginning
MANY_TASKS = 10  # the table leaves out the tasks of groups that have more
# What a task with a bad file, or with data out of reach, raises when it is built.
FROM_A_BAD_TASK = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError),
    *(datasets.exceptions.DatasetsError, HfHubHTTPError, TemplateError, YAMLError),
)


def load_benchmarks(
    options: BenchmarkOptions, run: EvalRunOptions
) -> tuple[list["Benchmark"], list[Part]]:
    """The tasks that the options name, with their documents, and the measures they make."""
    names = ", ".join(options.tasks)
    with _logged():
        manager = _manager(options)
    with _built(f"the tasks {names} must be valid and their documents available"):
        loaded = manager.load(list(options.tasks))
    tasks = loaded["tasks"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not options.run_generated_code:
            raise ConfigError(
                f"the task {name!r} runs code that the model writes; use a sandbox, and give "
                f"`--run-generated-code`"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"tasks must be text only, but {name!r} has images or sound")
        # The harness's own rule: a task that sets 0 keeps it.
        fixed = task.get_config("num_fewshot")
        if fixed is None or (options.num_fewshot is not None and fixed != 0):
            task.set_config(key="num_fewshot", value=options.num_fewshot or 0)
    benchmarks = [Benchmark(name, task, options, run) for name, task in tasks.items()]
    groups = loaded.get("groups", {})
    inner = {member for group in groups.values() for member in group.child_names}
    parts = [part for name in groups if name not in inner for part in _group_parts(name, groups, 0)]
    in_groups = {part.name for part in parts}
    return benchmarks, [*parts, *(Part(name, (name,)) for name in tasks if name not in in_groups)]


def _group_parts(name: str, groups: Mapping[str, Any], depth: int) -> Iterator[Part]:
    """A group, and its members below it."""
    group = groups[name]
    leaves = tuple(task.task_name for task in group.get_all_tasks())
    averaged = group.aggregate_metric_list or ()
    for mean in averaged:
        yield Part(name, leaves, mean.metric, mean.filter_list, bool(mean.weight_by_size), depth)
    inner = depth + bool(averaged)
    for member in group.child_names:
        if member in groups:
            yield from _group_parts(member, groups, inner)
        else:
            is_in_table = not averaged or len(leaves) <= MANY_TASKS
            yield Part(member, (member,), depth=inner, is_in_table=is_in_table)


def _manager(options: BenchmarkOptions) -> TaskManager:
    folder = options.task_folder
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(
            f"`task_folder` must be a folder of task files (YAML), but there is no {folder!r}"
        )
    for with_own in (False, True):  # the harness's own tasks are thousands of files
        manager = TaskManager(include_path=folder, include_defaults=with_own)
        unknown = [name for name in options.tasks if name not in manager.all_tasks]
        if not unknown:
            return manager
    also = f" or in {folder!r}" if folder is not None else "; give `task_folder` for others"
    raise ConfigError(
        f"every task must be one of lm-evaluation-harness{also}, got {unknown[0]!r}"
        f"{did_you_mean(unknown[0], manager.all_tasks)}"
    )


class HarnessModel(HFLM):
    """A model as the harness takes it; counts prompts that lose their beginning."""

    def __init__(self, loaded: Loaded, batch_size: int) -> None:
        with _logged():
            super().__init__(
                pretrained=loaded.model,
                tokenizer=loaded.tokenizer,
                batch_size=batch_size,
                max_batch_size=batch_size,
                chat_template_args={"chat_template": loaded.template.text},
            )
        to_evaluation(loaded.model)  # HFLM puts 4-bit layers in evaluation mode, too
        self.num_cut = 0

    # lm_eval 0.4.13 passes `disable` to tqdm, which overrides TQDM_DISABLE: its bars would be drawn
    # over ours. `loglikelihood_rolling` even asks `_loglikelihood_tokens` for a bar.
    loglikelihood = functools.partialmethod(HFLM.loglikelihood, disable_tqdm=True)
    loglikelihood_rolling = functools.partialmethod(HFLM.loglikelihood_rolling, disable_tqdm=True)
    generate_until = functools.partialmethod(HFLM.generate_until, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        return super()._loglikelihood_tokens(requests, **(kwargs | {"disable_tqdm": True}))

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a batch, and count the prompts that are cut: the harness warns once per batch."""
        tokens, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        longest = left_truncate_len or mask.shape[1]
        self.num_cut += int((mask.sum(dim=1) > longest).sum())
        return tokens[:, -longest:], mask[:, -longest:]


@dataclass(frozen=True)
class Benchmark:
    """One task of the harness, with its documents."""

    name: str
    task: Any
    options: BenchmarkOptions
    run: EvalRunOptions

    num_steps = None  # the harness decides how many passes there are

    def record(self) -> dict[str, Any]:
        """The version that the task file states."""
        about = self.task.get_config("metadata") or {}
        return {"kind": "benchmark", "version": about.get("version")}

    def inputs_sha256(self, loaded: Loaded) -> str:
        """The hash of all that decides the result except the model."""
        self._set_seeds()
        task, limit, is_chat = self.task, self.options.limit, self.options.apply_chat_template
        model = HarnessModel(loaded, self.run.batch_size)
        with _built(f"the task {self.name!r} must give a prompt for each of its documents"):
            task.build_all_requests(
                limit=limit,
                apply_chat_template=is_chat,
                fewshot_as_multiturn=is_chat,
                chat_template=model.apply_chat_template if is_chat else None,
            )
        config = task.config.to_dict(keep_callable=True)
        config.pop("dataset_kwargs", None)  # may say where the documents are, which are hashed
        requests = [[request.doc_id, request.idx, str(request.args)] for request in task.instances]
        documents = [str(doc) for _, doc in task.doc_iterator(limit=limit)]
        settings = json.dumps(config, default=source_of)
        return json_sha256([lm_eval.__version__, settings, requests, documents])

    def measured(self, loaded: Loaded, on_step: OnStep) -> Measured:
        """One model on this task."""
        self._set_seeds()
        options, name = self.options, self.name
        model, passes = HarnessModel(loaded, self.run.batch_size), itertools.count(1)
        base = base_model_of(loaded.model)  # which `PeftModel.generate` calls directly
        with (
            base.register_forward_hook(lambda *_: on_step(next(passes), None)),
            _logged() as logged,
            quiet("datasets"),
            torch.no_grad(),
        ):
            found = lm_eval.evaluate(
                lm=model,
                task_dict={"tasks": {name: self.task}, "groups": {}},
                limit=options.limit,
                bootstrap_iters=0,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
                confirm_run_unsafe_code=options.run_generated_code,
            )
        texts = [" ".join(record.getMessage().split())[:200] for record in logged]
        num_cut = model.num_cut + sum(bool(CUT.search(text)) for text in texts)
        warnings = list(dict.fromkeys(text for text in texts if not CUT.search(text)))
        if num_cut:
            lost = f"{num_cut:,} requests lost the beginning of their prompt to fit the model"
            warnings.insert(0, lost)
        values = {
            metric_name(*key.split(",", 1)): float(value)
            for key, value in found["results"][name].items()
            if "," in key and "_stderr," not in key and isinstance(value, Real)
        }
        totals = {metric: value for metric, value in values.items() if math.isfinite(value)}
        left_out = (metric for metric in values if metric not in totals)
        warnings += [f"{metric} is not finite, and left out" for metric in left_out]
        num_fewshot = self.task.get_config("num_fewshot")
        if options.num_fewshot not in (None, num_fewshot):
            fixed = f"{num_fewshot} examples in each prompt: the task file fixes the number"
            warnings.append(fixed)
        directions = found["higher_is_better"].get(name, {})
        return Measured(
            task=name,
            rows=self._rows(found["samples"][name], totals),
            totals=totals,
            higher_is_better={metric: directions.get(metric.split(" (")[0]) for metric in totals},
            facts={"num_fewshot": num_fewshot, "num_cut_prompts": num_cut, "warnings": warnings},
        )

    def _rows(self, samples: list[dict[str, Any]], totals: Mapping[str, float]) -> pd.DataFrame:
        """The value of each document, for metrics whose total is the mean over documents."""
        rows = pd.DataFrame(
            [
                {
                    "task": self.name,
                    "metric": metric_name(metric, sample["filter"]),
                    "document": int(sample["doc_id"]),
                    "document_sha256": sample["doc_hash"][:16],
                    "value": float(sample[metric]),
                    "size": 1.0,
                    "chance": _chance(self.task, metric, sample),
                }
                for sample in samples
                for metric in sample["metrics"]
                if isinstance(sample[metric], Real) and math.isfinite(sample[metric])
            ],
            columns=[*COLUMNS][2:],
        )
        means = rows.groupby("metric")["value"].mean()
        is_mean = [key for key in totals if math.isclose(means.get(key, math.nan), totals[key])]
        return rows[rows["metric"].isin(is_mean)].reset_index(drop=True)

    def _set_seeds(self) -> None:
        """Seed every generator that a task may use, as `lm_eval.simple_evaluate` does."""
        set_seed(self.run.seed)
        self.task.set_fewshot_seed(seed=self.run.seed)


def _chance(task: Any, metric: str, sample: dict[str, Any]) -> float:
    """How often a guess is right; NaN where that is not known."""
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice" or metric not in OF_CHOICES:
        return math.nan
    target = sample["target"]
    num_right = len(set(target)) if isinstance(target, list) else 1
    return num_right / len(task.doc_to_choice(sample["doc"]))


def source_of(value: Any) -> Any:
    """What JSON cannot hold: a function by its source, because `str` gives its address."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # built in, or made by a call
        return f"{type(value).__module__}.{getattr(value, '__qualname__', type(value).__name__)}"


@contextlib.contextmanager
def _built(must: str) -> Iterator[None]:
    """Report in one line what a task raises in the block."""
    try:
        with _logged(), quiet("datasets"):
            yield
    except FROM_A_BAD_TASK as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip()
        raise DataError(f"{must}, but the harness said: {reason}") from error


@contextlib.contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    """Collect the harness's warnings instead of printing them."""
    logger, handler = logging.getLogger("lm_eval"), BufferingHandler(sys.maxsize)
    before = logger.level, logger.propagate, logger.handlers[:]
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers[:] = False, [handler]
    try:
        yield handler.buffer
    finally:
        level, logger.propagate, logger.handlers[:] = before
        logger.setLevel(level)
