# SPDX-License-Identifier: Apache-2.0
"""Evaluate a base model, adapters and checkpoints on the same documents, from options to files."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keylayers.data.chat import resolve_template
from keylayers.environment import environment, num_launched
from keylayers.errors import ConfigError, RankingError
from keylayers.evaluation.documents import DOCUMENTS, Measured, Store
from keylayers.evaluation.measures import Part, corrected, measures_of
from keylayers.evaluation.options import EvalOptions
from keylayers.evaluation.record import EVALUATION, Evaluation
from keylayers.evaluation.subjects import Loaded, Subject, each_model, subjects_of
from keylayers.evaluation.texts import GAIN, Examples, examples_of
from keylayers.files import RECORD, json_sha256, output_folder, unfinished
from keylayers.progress import Progress, Silent
from keylayers.ranking.record import read_run

if TYPE_CHECKING:
    from keylayers.evaluation.benchmarks import Benchmark, HarnessModel

LIBRARIES = ("lm_eval", "scipy", "numpy")
# What decides which examples are held out, as far as records of trained models contain it.
OF_SPLIT = ("content_sha256", "max_examples", "held_out", "split_seed", "max_length_asked")


def evaluate(
    options: EvalOptions, output: str | Path, progress: Progress | None = None
) -> Evaluation:
    """Measure every model on everything that the options name, and write it to a folder.

    evaluation.json has all numbers, documents.parquet the values of each document. A model is not
    measured again on inputs that it was measured on before; a hash of both decides.

    Args:
        options: Which models, and what is measured.
        output: Folder of the evaluation.
        progress: Where to report progress.

    Raises:
        KeylayersError: a bad option, model, task or data set; finished results stay.
    """
    output = Path(output)
    if num_launched() > 1:
        raise ConfigError(
            f"an evaluation runs in one process, but a launcher started {num_launched()}; start "
            f"`keylayers eval` without it"
        )
    if options.benchmarks.tasks and find_spec("lm_eval") is None:
        raise ConfigError(
            "`tasks` need lm_eval, which is not installed; `pip install 'keylayers[eval]'`"
        )
    subjects = subjects_of(options.model, options.compared)
    with output_folder(output), unfinished(output / EVALUATION) as folder:
        run = _Run(options, Store(output, folder), progress or Silent())
        for loaded in each_model(subjects, options.model, options.losses.chat_template):
            run.measure(loaded)
            del loaded  # or it would stay in memory next to the following model
        found = run.evaluation()
        run.store.finish(run.names)
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
    names: dict[str, list[str]] = field(default_factory=dict)  # key -> models, equal ones share it
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure(self, loaded: Loaded) -> None:
        """Measure one model on everything that it was not measured on before."""
        if not self.jobs:  # this is the base model, whose tokens losses are measured in
            self._plan(loaded)
        name, harness = loaded.subject.name, self._harness_model(loaded)
        own = next((job.record() for job in self.jobs if job.name == GAIN), None)
        self.notes += _other_training(loaded, own, self.options.benchmarks.apply_chat_template)
        found = self.measured.setdefault(name, {})
        num_known = 0
        for job in self.jobs:
            model: Any = loaded if isinstance(job, Examples) else harness
            inputs = job.inputs_sha256(model)
            key = json_sha256([loaded.identity, job.name, inputs])
            known = self.store.get(key)
            if known is None:
                total = job.num_batches if isinstance(job, Examples) else None
                with self.progress.stage(f"{name}: {job.name}", total) as on_step:
                    known = job.measured(model, on_step)
                self.store.put(key, known)
            else:
                num_known += 1
            found[job.name] = known
            self.names.setdefault(key, []).append(name)
            about = {"pair": key, "model": name, "inputs_sha256": inputs}
            self.pairs.append({**about, **known.about()})
            self.notes += _notes(name, known)
        if num_known:
            num_all = len(self.jobs)
            share = "all" if num_known == num_all else f"{num_known} of {num_all}"
            self.progress.note(f"{name}: {share} measured before")
        self.models[name] = {"kind": loaded.subject.kind, **loaded.record}

    def evaluation(self) -> Evaluation:
        """All measures of what was measured."""
        options = self.options
        others = [name for name, about in self.models.items() if about["kind"] != "base"]
        given = (*options.compared.adapter, *options.compared.checkpoint)
        reference = None
        if len(others) > 1:
            reference = others[given.index(options.compared.reference or given[0])]
        seed = options.run.seed
        measures = [
            measure
            for part in self.parts
            for measure in measures_of(part, self.measured, reference, seed)
        ]
        return Evaluation(
            measures=tuple(corrected(measures)),
            models=self.models,
            reference=reference,
            notes=tuple(dict.fromkeys(self.notes)),
            provenance={
                "options": options.flat(),
                "environment": environment() | {"evaluation_libraries": _versions()},
                "inputs": {job.name: job.record() for job in self.jobs},
                "pairs": self.pairs,
                "documents": DOCUMENTS,
            },
        )

    def _plan(self, base: Loaded) -> None:
        """What is measured, in the order of the table."""
        options = self.options
        examples = examples_of(options.losses, base, options.run.batch_size)
        self.jobs += examples
        self.parts += [Part(own.name, (own.name,)) for own in examples]
        for own in examples:
            self.notes.append(own.note)
            self.progress.note(own.note)
        if options.benchmarks.tasks:
            from keylayers.evaluation.benchmarks import load_benchmarks

            benchmarks, parts = load_benchmarks(options.benchmarks, options.run.seed)
            self.jobs += benchmarks
            self.parts += parts
        names = [job.name for job in self.jobs]
        if twice := [name for index, name in enumerate(names) if name in names[:index]]:
            raise ConfigError(
                f"tasks must have other names than the losses, but there are two {twice[0]!r}; "
                f"rename the task"
            )

    def _harness_model(self, loaded: Loaded) -> "HarnessModel | None":
        if not self.options.benchmarks.tasks:
            return None
        from keylayers.evaluation.benchmarks import HarnessModel

        return HarnessModel(loaded, self.options.run.batch_size)


def _other_training(
    loaded: Loaded, held_out: dict[str, Any] | None, are_tasks_chats: bool
) -> Iterator[str]:
    """Notes on a model that keylayers trained on another split or in another chat template."""
    name, trained = loaded.subject.name, _trained_on(loaded.subject)
    if held_out and any(key in trained and trained[key] != held_out[key] for key in OF_SPLIT):
        yield (
            f"{name} was trained on other data or another split of it: its training may have seen "
            f"examples that count as held out here"
        )
    used = [held_out["chat_template"]] if held_out and held_out["chat_template"] else []
    used += [asdict(loaded.template)] if are_tasks_chats else []
    own = _template_of(trained, loaded)
    if own and (others := [template["name"] for template in used if template["text"] != own[1]]):
        yield (
            f"{name} was trained in the chat template {own[0]!r}, but is measured in "
            f"{others[0]!r}; give `--chat-template` as in training"
        )


def _trained_on(subject: Subject) -> dict[str, Any]:
    """What the record in a model's folder says about its training data; empty without a record."""
    if subject.kind == "base":
        return {}
    try:
        content = read_run(Path(subject.source) / RECORD).content
    except RankingError:
        return {}  # there is none, or it is not ours
    return dict(content.get("data") or content.get("options", {}))


def _template_of(trained: dict[str, Any], loaded: Loaded) -> tuple[str, str] | None:
    """Name and text of the chat template that a model was trained in, if its record says so."""
    said = trained.get("chat_template")
    with suppress(KeyError, ConfigError):  # ConfigError: a file that no longer exists
        if isinstance(said, dict):
            return str(said["name"]), str(said["text"])
        if isinstance(said, str):  # an option; without it we do not know whether it had chats
            found = resolve_template(loaded.tokenizer, said)
            return found.name, found.text
    return None


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES if find_spec(name) is not None}


def _notes(model: str, measured: Measured) -> Sequence[str]:
    """What a reader must know about one model on one task."""
    notes = list(measured.facts.get("warnings", ()))
    if number := measured.facts.get("num_cut_prompts", 0):
        notes.insert(0, f"{number:,} requests lost the beginning of their prompt to fit the model")
    return [f"{model}, {measured.task}: {text}" for text in notes]
