# SPDX-License-Identifier: Apache-2.0
"""Evaluate a base model, adapters and checkpoints side by side, from options to files."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from keylayers.data.chat import resolve_template
from keylayers.environment import environment, num_launched
from keylayers.errors import ConfigError
from keylayers.evaluation.documents import DOCUMENTS, Measured, Store
from keylayers.evaluation.measures import corrected, measures_of
from keylayers.evaluation.options import EvalOptions
from keylayers.evaluation.record import EVALUATION, Evaluation
from keylayers.evaluation.subjects import Loaded, Subject, each_model, subjects_of
from keylayers.evaluation.texts import GAIN
from keylayers.files import RECORD, json_sha256, output_folder, unfinished
from keylayers.progress import Progress, Silent
from keylayers.runs.eval_jobs import Plan, need_libraries, planned

LIBRARIES = ("lm_eval", "scipy", "numpy")
# What decides which examples are held out, as far as records of trained models hold it.
OF_SPLIT = ("content_sha256", "max_examples", "held_out", "split_seed", "max_length_asked")


def evaluate(
    options: EvalOptions, output: str | Path, progress: Progress | None = None
) -> Evaluation:
    """Measure every model on everything that the options name, and write it to a folder.

    evaluation.json has all numbers, documents.parquet each document of each model. What is
    finished is not measured again when the same is asked for again; the hash of model and inputs
    decides.

    Args:
        options: Which models, and what is measured.
        output: Folder of the evaluation.
        progress: Where to report to.

    Raises:
        KeylayersError: a bad option, model, task or data set; what was finished stays.
    """
    progress, output = progress or Silent(), Path(output)
    if num_launched() > 1:
        raise ConfigError(
            f"an evaluation runs in one process, but a launcher started {num_launched()}; start "
            f"`keylayers eval` by itself"
        )
    need_libraries(options)
    with output_folder(output), unfinished(output / EVALUATION) as under_way:
        store = Store(output, under_way)
        run = _Run(options, store, progress)
        for loaded in each_model(
            subjects_of(options.model, options.compared),
            options.model,
            options.losses.chat_template,
        ):
            run.measure(loaded)
            del loaded  # or it would be in memory beside the next one
        found = run.evaluation()
        store.finish(run.names)
        found.save(output / EVALUATION)
    return found


class _Run:
    """Model after model, job after job."""

    def __init__(self, options: EvalOptions, store: Store, progress: Progress) -> None:
        self.options = options
        self.store = store
        self.progress = progress
        self.plan: Plan | None = None
        self.names: dict[str, list[str]] = {}  # key -> names of the models, equal ones have one
        self.measured: dict[str, dict[str, Measured]] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.pairs: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def measure(self, loaded: Loaded) -> None:
        """Every job on this model, but for those that are finished."""
        name = loaded.subject.name
        if self.plan is None:
            self.plan = planned(self.options, loaded)
            self.notes += self.plan.notes
            for note in self.plan.notes:
                self.progress.note(note)
        self._note_other_training(loaded)
        found = self.measured.setdefault(name, {})
        num_kept = 0
        for job in self.plan.jobs:
            inputs = job.inputs_sha256(loaded)
            key = json_sha256([loaded.identity, job.name, inputs])
            kept = self.store.get(key)
            if kept is None:
                kept = job.run(loaded, self.progress)
                self.store.put(key, kept)
            else:
                num_kept += 1
            found[job.name] = kept
            self.names.setdefault(key, []).append(name)
            self.pairs.append({"pair": key, "model": name, "inputs_sha256": inputs, **kept.about()})
            self.notes += _notes(name, kept)
        if num_kept:
            of = (
                "all" if num_kept == len(self.plan.jobs) else f"{num_kept} of {len(self.plan.jobs)}"
            )
            self.progress.note(f"{name}: {of} measured before")
        self.models[name] = {"kind": loaded.subject.kind, **loaded.record}
        self.plan.harness.release()

    def evaluation(self) -> Evaluation:
        """All measures, from what is measured."""
        assert self.plan is not None
        options = self.options
        others = [name for name in self.measured if self.models[name]["kind"] != "base"]
        reference = None
        if len(others) > 1:
            given = (*options.compared.adapter, *options.compared.checkpoint)
            wanted = options.compared.reference or given[0]
            reference = others[given.index(wanted)]
        measures = [
            one
            for part in self.plan.parts
            for one in measures_of(part, self.measured, reference, options.run.seed)
        ]
        return Evaluation(
            measures=tuple(corrected(measures)),
            models=self.models,
            reference=reference,
            notes=tuple(dict.fromkeys(self.notes)),
            provenance={
                "options": options.flat(),
                "environment": environment() | {"evaluation_libraries": _versions()},
                "inputs": {job.name: job.record() for job in self.plan.jobs},
                "pairs": self.pairs,
                "documents": DOCUMENTS,
            },
        )

    def _note_other_training(self, loaded: Loaded) -> None:
        """Say so where keylayers trained a model on another split, or in another chat template."""
        assert self.plan is not None
        own = next((job.record() for job in self.plan.jobs if job.name == GAIN), None)
        trained = _trained_on(loaded.subject)
        if own and any(name in trained and trained[name] != own[name] for name in OF_SPLIT):
            self.notes.append(
                f"{loaded.subject.name} was trained on other data or another split of it: its "
                f"training may have seen examples that count as held out here"
            )
        used = [own["chat_template"]] if own and own["chat_template"] else []
        if self.options.benchmarks.apply_chat_template:
            used.append(asdict(loaded.template))
        name, text = _template_of(trained, loaded) or (None, None)
        if others := [one["name"] for one in used if name and one["text"] != text]:
            self.notes.append(
                f"{loaded.subject.name} was trained in the chat template {name!r}, but is measured "
                f"in {others[0]!r}; give `--chat-template` as in training"
            )


def _trained_on(subject: Subject) -> dict[str, Any]:
    """What the record beside a model says of the data it was trained on; empty without one."""
    record = Path(subject.source) / RECORD
    if subject.kind == "base" or not record.is_file():
        return {}
    try:
        made = json.loads(record.read_text(encoding="utf-8"))
        return dict(made.get("data") or made["options"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}  # nothing is known of its training


def _template_of(trained: dict[str, Any], loaded: Loaded) -> tuple[str, str] | None:
    """Name and text of the chat template that a model was trained in, if its record says so."""
    said = trained.get("chat_template")
    try:
        if isinstance(said, dict):
            return str(said["name"]), str(said["text"])
        # An option; without it the record does not say whether there were chats at all.
        found = resolve_template(loaded.tokenizer, said) if isinstance(said, str) else None
    except (KeyError, ConfigError):
        return None  # a file that is no longer there
    return (found.name, found.text) if found else None


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _notes(model: str, one: Measured) -> Iterator[str]:
    """What a reader must know of one model on one task."""
    facts = one.facts
    if number := facts.get("num_cut_prompts", 0):
        what = "requests lost the beginning of their prompt to fit the model"
        yield f"{model}, {one.task}: {number:,} {what}"
    for text in facts.get("warnings", ()):
        yield f"{model}, {one.task}: {text}"
