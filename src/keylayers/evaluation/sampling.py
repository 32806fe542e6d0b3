# SPDX-License-Identifier: Apache-2.0
"""Answers of a model to problems: sampled in batches, checked, and on disk as they come.

A batch is decided by the problems and the options alone, and so is its seed, so that a run which
was killed goes on with the answers that it would have given. More samples later are added to those
that are there.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keylayers.data.chat import render
from keylayers.data.formats import Message
from keylayers.errors import OutputError
from keylayers.evaluation.answers import verdict
from keylayers.evaluation.generation import (
    Ending,
    Speaker,
    plain_sampling,
    replies,
    seeded,
    stop_tokens,
)
from keylayers.evaluation.judge.lines import LineFile, read_lines
from keylayers.evaluation.options import ProblemOptions
from keylayers.evaluation.problems import Problem
from keylayers.evaluation.subjects import Loaded
from keylayers.files import json_sha256
from keylayers.progress import OnStep

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
        rows, num_damaged = read_lines(path)
        try:
            samples = [Sample(**row) for row in rows[1:]]
        except TypeError:
            num_damaged += 1
        if num_damaged:
            raise OutputError(
                f"{str(path)!r} must hold samples that `keylayers eval` wrote, but {num_damaged} "
                f"lines are something else; move it away"
            )
        self.found = {(one.problem, one.sample): one for one in samples}
        if not rows:
            self._write([about])

    def add(self, samples: Sequence[Sample]) -> None:
        """Write them, on disk before this returns."""
        self._write([asdict(one) for one in samples])
        self.found |= {(one.problem, one.sample): one for one in samples}

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with LineFile(self.path) as file:
            for row in rows:
                file.add(row)


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


def decisive(
    prompts: Sequence[Sequence[int]], loaded: Loaded, options: ProblemOptions, seed: int
) -> str:
    """The hash of all that decides the samples but the model itself.

    Of all prompts together, since samples are drawn for a batch of them, by one seed.
    """
    sampling = [options.resolved_temperature, options.top_p, options.max_new_tokens, seed]
    return json_sha256([sampling, stop_tokens(_speaker(loaded)), [list(one) for one in prompts]])


def _speaker(loaded: Loaded) -> Speaker:
    return Speaker(loaded.model, loaded.tokenizer, loaded.template, loaded.identity)


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


def _checked(problem: Problem, number: int, text: str, ending: Ending, num_tokens: int) -> Sample:
    found = verdict(text, problem.answer)
    return Sample(
        problem=problem.sha256(),
        sample=number,
        text=text,
        num_tokens=num_tokens,
        is_cut=ending != "stop",
        **asdict(found),
    )


def _generate(
    prompts: Sequence[list[int]], loaded: Loaded, options: ProblemOptions, key: list[Any]
) -> list[tuple[str, Ending, int]]:
    """Text, ending and number of tokens for each prompt."""
    speaker = _speaker(loaded)
    sampling = plain_sampling(
        options.resolved_temperature,
        options.max_new_tokens,
        stop_tokens(speaker),
        speaker,
        options.top_p,
    )
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    with seeded(int.from_bytes(digest[:8], "big") >> 1, loaded.model.device):
        return replies(speaker, prompts, sampling)
