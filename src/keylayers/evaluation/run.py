# SPDX-License-Identifier: Apache-2.0
"""Evaluate a base model, adapters and checkpoints on the same documents, from options to files."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keylayers.data.templates import resolve_template
from keylayers.environment import environment, num_launched
from keylayers.errors import ConfigError, RankingError
from keylayers.evaluation.documents import DOCUMENTS, Measured, Store
from keylayers.evaluation.measures import EVALUATION, Evaluation, Part, correct, measures_of
from keylayers.evaluation.options import EvalOptions
from keylayers.evaluation.subjects import Loaded, each_model
from keylayers.evaluation.texts import GAIN, Examples, examples_of
from keylayers.files import RECORD, json_sha256, output_folder, unfinished
from keylayers.progress import Progress
from keylayers.ranking.record import read_run

if TYPE_CHECKING:
    from keylayers.evaluation.benchmarks import Benchmark

LIBRARIES = ("lm_eval", "scipy", "numpy")
# What decides which examples are held out, as far as records of trained models contain it.
OF_SPLIT = ("content_sha256", "max_examples", "held_out", "split_seed", "max_length_asked")


def evaluate(options: EvalOptions, output: Path, progress: Progress | None = None) -> Evaluation:
    """Measure every model on everything that the options name, and write it to a folder.

    A model is not measured again on inputs that it was measured on before; a hash of both decides.
    """
    if num_launched() > 1:
        raise ConfigError(
            f"an evaluation runs in one process, but a launcher started {num_launched()}; start "
            f"`keylayers eval` without it"
        )
    if options.benchmarks.tasks and find_spec("lm_eval") is None:
        raise ConfigError(
            "`tasks` need lm_eval, which is not installed; `pip install 'keylayers[eval]'`"
        )
    with output_folder(output), unfinished(output / EVALUATION) as folder:
        run = _Run(options, Store(output, folder), progress or Progress())
        for loaded in each_model(options.model, options.compared, options.losses.chat_template):
            run.measure(loaded)
            del loaded  # or it would stay in memory next to the following model
        found = run.evaluation()
        run.store.finish([(pair["pair"], pair["model"]) for pair in run.pairs])
        found.save(output / EVALUATION)
    return found


@dataclass
class _Run:
    """What is known so far: models are measured one after the other."""

    options: EvalOptions
    store: Store
    progress: Progress
    jobs: list["Examples | Benchmark"] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)  # by model and job
    pairs: list[dict[str, Any]] = field(default_factory=list)  # the same, for the record
    notes: list[str] = field(default_factory=list)

    def measure(self, loaded: Loaded) -> None:
        """Measure one model on everything that it was not measured on before."""
        if not self.jobs:  # this is the base model, whose tokens losses are measured in
            self._plan(loaded)
        name, num_jobs, num_known = loaded.name, len(self.jobs), 0
        own = next((job.record() for job in self.jobs if job.name == GAIN), None)
        self.notes += _other_training(loaded, own, self.options.benchmarks.apply_chat_template)
        self.models[name] = {"kind": loaded.kind, **loaded.record}
        self.measured[name] = {}
        for job in self.jobs:
            inputs = job.inputs_sha256(loaded)
            key = json_sha256([loaded.identity, job.name, inputs])
            if key in self.store.pairs:
                num_known += 1
            else:
                with self.progress.stage(f"{name}: {job.name}", job.num_steps) as on_step:
                    self.store.put(key, job.measured(loaded, on_step))
            self.measured[name][job.name] = found = self.store.pairs[key]
            about = {"pair": key, "model": name, "inputs_sha256": inputs}
            self.pairs.append(about | found.about())
            warnings = found.facts.get("warnings", ())
            self.notes += [f"{name}, {job.name}: {text}" for text in warnings]
        if num_known:
            share = "all" if num_known == num_jobs else f"{num_known} of {num_jobs}"
            self.progress.note(f"{name}: {share} measured before")

    def evaluation(self) -> Evaluation:
        """All measures of what was measured."""
        compared, seed = self.options.compared, self.options.run.seed
        reference = None
        if len(compared.sources) > 1:
            reference = compared.names[compared.reference or compared.sources[0]]
        measures = [
            measure
            for part in self.parts
            for measure in measures_of(part, self.measured, reference, seed)
        ]
        correct(measures)
        versions = {name: metadata.version(name) for name in LIBRARIES if find_spec(name)}
        return Evaluation(
            measures=tuple(measures),
            models=self.models,
            reference=reference,
            notes=tuple(dict.fromkeys(self.notes)),
            provenance={
                "options": self.options.flat(),
                "environment": environment() | {"evaluation_libraries": versions},
                "inputs": {job.name: job.record() for job in self.jobs},
                "pairs": self.pairs,
                "documents": DOCUMENTS,
            },
        )

    def _plan(self, base: Loaded) -> None:
        """What is measured, in the order of the table."""
        options = self.options
        for examples in examples_of(options.losses, base, options.run.batch_size):
            self.jobs.append(examples)
            self.parts.append(Part(examples.name, (examples.name,)))
            source = examples.source.get("data") or examples.source["name"]
            note = f"{examples.name}: {len(examples.tokens)} examples of {source!r}"
            self.notes.append(note)
            self.progress.note(note)
        if options.benchmarks.tasks:
            from keylayers.evaluation.benchmarks import load_benchmarks

            benchmarks, parts = load_benchmarks(options.benchmarks, options.run)
            for name in {job.name for job in self.jobs} & {job.name for job in benchmarks}:
                raise ConfigError(
                    f"tasks must have other names than the losses, but there are two {name!r}; "
                    f"rename the task"
                )
            self.jobs += benchmarks
            self.parts += parts


def _other_training(
    loaded: Loaded, held_out: dict[str, Any] | None, are_tasks_chats: bool
) -> Iterator[str]:
    """Notes on a model that keylayers trained on another split or in another chat template."""
    if loaded.kind == "base":
        return
    try:
        content = read_run(Path(loaded.source) / RECORD).content
    except RankingError:
        return  # there is none, or it is not ours
    trained = dict(content.get("data") or content.get("options", {}))
    if held_out and any(key in trained and trained[key] != held_out[key] for key in OF_SPLIT):
        yield (
            f"{loaded.name} was trained on other data or another split of it: its training may "
            f"have seen examples that count as held out here"
        )
    template = trained.get("chat_template")
    if isinstance(template, str):  # an option; without it we do not know whether it had chats
        with suppress(ConfigError):  # a file that no longer exists
            template = asdict(resolve_template(loaded.tokenizer, template))
    if not isinstance(template, dict):
        return
    used = [held_out["chat_template"]] if held_out and held_out["chat_template"] else []
    used += [asdict(loaded.template)] if are_tasks_chats else []
    if others := [own["name"] for own in used if own["text"] != template["text"]]:
        yield (
            f"{loaded.name} was trained in the chat template {template['name']!r}, but is measured "
            f"in {others[0]!r}; give `--chat-template` as in training"
        )
