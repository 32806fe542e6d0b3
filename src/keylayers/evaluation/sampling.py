# SPDX-License-Identifier: Apache-2.0
"""Answers of a model to problems: sampled in batches, checked, and on disk as they come.

A batch is decided by the problems and the options alone, and so is its seed, so that a run which
was killed goes on with the answers that it would have given. More samples later are added to those
that are there.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from keylayers.errors import OutputError
from keylayers.evaluation.answers import verdict
from keylayers.evaluation.problems import Problem
from keylayers.evaluation.subjects import Loaded
from keylayers.options.evaluation import ProblemOptions
from keylayers.progress import OnStep
from keylayers.records import cannot_write, json_sha256
from keylayers.training.chat import render
from keylayers.training.formats import Message

ASK = "\n\nReason step by step, and put the final answer into \\boxed{}."


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        problem: Hash of the problem.
        sample: Its number among those of the problem, from 0.
        text: What the model wrote.
        num_tokens: How much that was.
        is_cut: It ended because it was too long.
        answer: What it answers; None if nothing.
        is_right: Whether that is right.
        is_out_of_time: The checker had to be stopped.
    """

    problem: str
    sample: int
    text: str
    num_tokens: int
    is_cut: bool
    answer: str | None
    is_right: bool
    is_out_of_time: bool


class SampleFile:
    """Samples as lines of JSON, each there for good once it is written.

    The first line says what they are samples of.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.found: dict[tuple[str, int], Sample] = {}
        kept = self._read()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "w+b") as file:
                file.truncate(kept)  # a line that a killed run did not finish
                if kept == 0:
                    file.write(json.dumps(about, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise OutputError(cannot_write(path, error)) from error

    def _read(self) -> int:
        """Take in what is there; how many bytes of it are whole lines."""
        if not self.path.is_file():
            return 0
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            for line in whole.splitlines()[1:]:
                one = Sample(**json.loads(line))
                self.found[one.problem, one.sample] = one
        except (ValueError, TypeError, RecursionError) as error:
            raise OutputError(
                f"{str(self.path)!r} must hold samples that `keylayers eval` wrote, but does not: "
                f"{error}; move it away"
            ) from error
        return len(whole)

    def add(self, samples: Sequence[Sample]) -> None:
        """Write them, on disk before this returns."""
        lines = [json.dumps(asdict(one), ensure_ascii=True) + "\n" for one in samples]
        try:
            with self.path.open("ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(cannot_write(self.path, error)) from error
        self.found |= {(one.problem, one.sample): one for one in samples}


def prompts_of(
    problems: Sequence[Problem], loaded: Loaded, options: ProblemOptions
) -> list[list[int]]:
    """Each problem as the model is asked, in tokens."""
    ask = ASK if options.ask is None else f"\n\n{options.ask}"
    found = []
    for one in problems:
        messages = [Message("user", one.text + ask)]
        text, _ = render(messages, loaded.tokenizer, loaded.template, prompt=True)
        found.append(loaded.tokenizer.encode(text, add_special_tokens=False))
    return found


def decisive(prompts: Sequence[Sequence[int]], options: ProblemOptions, seed: int) -> str:
    """The hash of all that decides the samples but the weights."""
    sampling = [options.resolved_temperature, options.top_p, options.max_new_tokens, seed]
    return json_sha256([sampling, [list(one) for one in prompts]])


def sample_answers(
    problems: Sequence[Problem],
    loaded: Loaded,
    options: ProblemOptions,
    file: SampleFile,
    *,
    batch_size: int,
    seed: int,
    on_step: OnStep,
) -> None:
    """Add the samples to `file` that are not there yet.

    Args:
        problems: Each gets `options.samples` answers.
        loaded: The model.
        options: How it is asked and sampled.
        file: Has what was sampled before.
        batch_size: Answers at once.
        seed: Of all batches.
        on_step: Called after each batch.
    """
    prompts = prompts_of(problems, loaded, options)
    keys = [one.sha256() for one in problems]
    batches = list(_batches(prompts, options.samples, batch_size))
    for step, (number, chosen) in enumerate(batches, start=1):
        missing = [index for index in chosen if (keys[index], number) not in file.found]
        if missing:
            texts = _generate(
                [prompts[index] for index in chosen],
                loaded,
                options,
                [seed, number, *(keys[index] for index in chosen)],
            )
            by_index = dict(zip(chosen, texts, strict=True))
            file.add([_checked(problems[index], number, *by_index[index]) for index in missing])
        on_step(step, None)


def num_batches(num_problems: int, num_samples: int, batch_size: int) -> int:
    """How many steps `sample_answers` takes."""
    return num_samples * -(-num_problems // batch_size)


def _batches(
    prompts: Sequence[Sequence[int]], num_samples: int, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """The number of the sample and which problems: the first sample of all, then the second."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    for number in range(num_samples):
        for start in range(0, len(order), batch_size):
            yield number, order[start : start + batch_size]


def _checked(problem: Problem, number: int, text: str, num_tokens: int, is_cut: bool) -> Sample:
    found = verdict(text, problem.answer)
    return Sample(
        problem=problem.sha256(),
        sample=number,
        text=text,
        num_tokens=num_tokens,
        is_cut=is_cut,
        **asdict(found),
    )


def _generate(
    prompts: Sequence[Sequence[int]], loaded: Loaded, options: ProblemOptions, key: list[Any]
) -> list[tuple[str, int, bool]]:
    """Text, number of tokens and whether it was cut, for each prompt."""
    longest = max(len(one) for one in prompts)
    room = options.max_new_tokens
    if loaded.max_positions is not None:
        room = min(room, loaded.max_positions - longest)
    if room < 1:
        return [("", 0, True)] * len(prompts)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.full((len(prompts), longest), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, one in enumerate(prompts):  # padded on the left, so that all end where answers begin
        ids[row, longest - len(one) :] = torch.tensor(one)
        mask[row, longest - len(one) :] = 1
    seed = int(hashlib.sha256(json.dumps(key).encode()).hexdigest()[:15], 16)
    ends = _end_tokens(loaded)
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=model.device.type):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_generation_config(options, room, ends, tokenizer.pad_token_id),
        )
    found = []
    for row in out[:, longest:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        kept = row if end is None else row[:end]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        found.append((text, len(kept), end is None))
    return found


def _end_tokens(loaded: Loaded) -> list[int]:
    """Every token that ends an answer: the model's own, and the tokenizer's."""
    own = loaded.model.generation_config.eos_token_id
    tokens = own if isinstance(own, list) else [own]
    return sorted({one for one in (*tokens, loaded.tokenizer.eos_token_id) if one is not None})


def _generation_config(
    options: ProblemOptions, room: int, ends: list[int], padding: int
) -> GenerationConfig:
    """Explicit: what a checkpoint says of its generation would fill what is left open."""
    fixed: dict[str, Any] = {"max_new_tokens": room, "eos_token_id": ends, "pad_token_id": padding}
    fixed |= {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    temperature = options.resolved_temperature
    if temperature == 0:
        return GenerationConfig(do_sample=False, **fixed)
    return GenerationConfig(
        do_sample=True, temperature=temperature, top_p=options.top_p, top_k=0, **fixed
    )
