# SPDX-License-Identifier: Apache-2.0
"""What an evaluation does with each model: benchmarks and losses.

A job knows the hash of all that decides its result but the model, and how to measure one model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from keylayers.errors import ConfigError
from keylayers.evaluation.documents import Measured
from keylayers.evaluation.measures import Part
from keylayers.evaluation.options import EvalOptions
from keylayers.evaluation.subjects import Loaded
from keylayers.evaluation.texts import (
    Examples,
    check_tokenizer,
    examples_of,
    measured_losses,
)
from keylayers.progress import Progress

if TYPE_CHECKING:
    from keylayers.evaluation.benchmarks import Benchmarks, HarnessModel, TaskGroup

MANY_TASKS = 10  # a group of more is shown without its tasks, which the record holds


@runtime_checkable
class Job(Protocol):
    """One thing to measure on every model."""

    @property
    def name(self) -> str:
        """Different from that of all other jobs."""
        ...

    def inputs_sha256(self, loaded: Loaded) -> str:
        """The hash of what decides the result, but for the model."""
        ...

    def run(self, loaded: Loaded, progress: Progress) -> Measured:
        """Measure one model."""
        ...

    def record(self) -> dict[str, Any]:
        """What a record says of it."""
        ...


@dataclass
class TaskJob:
    """One task of the harness."""

    name: str
    task: Any
    options: EvalOptions
    harness: "Harness"

    def inputs_sha256(self, loaded: Loaded) -> str:
        """Of prompts, documents and scoring."""
        from keylayers.evaluation.benchmarks import inputs_sha256

        model, options = self.harness.model(loaded), self.options
        return inputs_sha256(self.name, self.task, model, options.benchmarks, options.run.seed)

    def run(self, loaded: Loaded, progress: Progress) -> Measured:
        """One model on this task."""
        from keylayers.evaluation.benchmarks import run_benchmark

        model = self.harness.model(loaded)
        with progress.stage(f"{loaded.subject.name}: {self.name}", None) as on_step:
            model.num_passes, model.on_step = 0, on_step
            options, seed = self.options.benchmarks, self.options.run.seed
            return run_benchmark(self.name, self.task, model, options, seed)

    def record(self) -> dict[str, Any]:
        """Its kind and the version that its file gives it."""
        about = self.task.get_config("metadata") or {}
        return {"kind": "benchmark", "version": about.get("version")}


class Harness:
    """The harness' wrapping of the model that is measured just now."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._last: tuple[Loaded, HarnessModel] | None = None

    def model(self, loaded: Loaded) -> "HarnessModel":
        """One wrapping for all tasks of a model."""
        from keylayers.evaluation.benchmarks import HarnessModel

        if self._last is None or self._last[0] is not loaded:
            self._last = (loaded, HarnessModel(loaded, self.batch_size))
        return self._last[1]

    def release(self) -> None:
        """Let go of the model, so that the next can take its place in memory."""
        self._last = None


@dataclass
class LossJob:
    """The loss on one set of examples."""

    examples: Examples
    options: EvalOptions

    @property
    def name(self) -> str:
        """Of the set."""
        return self.examples.name

    def inputs_sha256(self, loaded: Loaded) -> str:
        """Of the tokens."""
        check_tokenizer(self.examples, loaded)
        return self.examples.sha256()

    def run(self, loaded: Loaded, progress: Progress) -> Measured:
        """The loss of one model."""
        batch_size = self.options.run.batch_size
        num_steps = -(-len(self.examples.tokens) // batch_size)
        with progress.stage(f"{loaded.subject.name}: {self.name}", num_steps) as on_step:
            return measured_losses(self.examples, loaded, batch_size=batch_size, on_step=on_step)

    def record(self) -> dict[str, Any]:
        """Where the examples come from."""
        return {"kind": "loss", **self.examples.record}


def need_libraries(options: EvalOptions) -> None:
    """Raise a ConfigError where the extra `eval` is needed and not installed."""
    if options.benchmarks.tasks and find_spec("lm_eval") is None:
        raise ConfigError(
            "`tasks` need lm_eval, which is not installed; `pip install 'keylayers[eval]'`"
        )


@dataclass(frozen=True)
class Plan:
    """All jobs, what of them makes a measure, and what a person should know before they run."""

    jobs: tuple[Job, ...]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    harness: Harness


def planned(options: EvalOptions, loaded: Loaded) -> Plan:
    """What is to be measured, in the order in which it is shown.

    Args:
        options: All of them.
        loaded: The base model, whose tokens losses are measured in.

    Raises:
        KeylayersError: data or tasks are missing or cannot be used.
    """
    jobs: list[Job] = []
    parts: list[Part] = []
    notes: list[str] = []
    harness = Harness(options.run.batch_size)
    for examples in examples_of(options.losses, loaded):
        jobs.append(LossJob(examples, options))
        parts.append(Part(examples.name, (examples.name,)))
        notes += examples.notes
    if options.benchmarks.tasks:
        from keylayers.evaluation.benchmarks import load_benchmarks

        found = load_benchmarks(options.benchmarks)
        jobs += [TaskJob(name, task, options, harness) for name, task in found.tasks.items()]
        parts += _task_parts(found)
    names = [one.name for one in jobs]
    if twice := [name for index, name in enumerate(names) if name in names[:index]]:
        raise ConfigError(
            f"tasks must have names other than those of the losses, but two are {twice[0]!r}; "
            f"rename the task"
        )
    return Plan(tuple(jobs), tuple(parts), tuple(notes), harness)


def _task_parts(found: "Benchmarks") -> Iterator[Part]:
    """Groups with what stands in them, then the tasks that stand in no group."""
    groups = {one.name: one for one in found.groups}
    inner = {member for one in found.groups for member in one.members}
    seen: set[str] = set()
    for name in groups:
        if name not in inner:
            yield from _group_parts(groups[name], groups, 0, seen)
    for name in found.tasks:
        if name not in seen:
            yield Part(name, (name,))


def _group_parts(
    group: "TaskGroup",
    groups: Mapping[str, "TaskGroup"],
    depth: int,
    seen: set[str],
) -> Iterator[Part]:
    for one in group.metrics:
        yield Part(
            group.name,
            group.leaves,
            is_by_size=one.is_by_size,
            metric=one.metric,
            filters=one.filters,
            depth=depth,
            is_group=True,
        )
    inner = depth + bool(group.metrics)
    are_few = len(group.leaves) <= MANY_TASKS
    for member in group.members:
        if member in groups:
            yield from _group_parts(groups[member], groups, inner, seen)
        else:
            seen.add(member)
            hidden = None if are_few or not group.metrics else ()
            yield Part(member, (member,), depth=inner, in_table=hidden)
