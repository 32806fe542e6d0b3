# SPDX-License-Identifier: Apache-2.0
"""Answers of a model to questions of several turns, written down as they come.

A turn is answered with the turns and answers before it in the conversation. Questions are taken in
batches that depend only on the question file and the temperatures, and each batch is sampled with a
seed of its own, so that a run that was killed goes on with the answers that it would have given.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from keylayers.evaluation.generation import Ending
from keylayers.evaluation.judge.lines import read_lines
from keylayers.evaluation.judge.options import AnswerOptions, JudgedOptions
from keylayers.evaluation.judge.questions import Question
from keylayers.files import json_sha256


@dataclass(frozen=True)
class Answer:
    """A model's answers to all turns of one question.

    Attributes:
        key: Of question, settings and chat template.
        model_sha256: Of the model that gave it.
        question_id: As in the question file.
        turns: What it said, turn by turn.
        endings: How each turn ended: by itself, at the limit, or there was no room to answer.
        num_tokens: Of each turn.
    """

    key: str
    model_sha256: str
    question_id: int | str
    turns: tuple[str, ...]
    endings: tuple[Ending, ...]
    num_tokens: tuple[int, ...]

    def row(self) -> dict[str, Any]:
        """As a line of a file holds it."""
        return asdict(self)

    @staticmethod
    def of(row: Mapping[str, Any]) -> "Answer | None":
        """What a line of a file holds; None if it is no answer."""
        key, model, name = row.get("key"), row.get("model_sha256"), row.get("question_id")
        turns, sizes = _all(row.get("turns"), str), _all(row.get("num_tokens"), int)
        endings = _all(row.get("endings"), str)
        is_whole = bool(turns) and len(turns) == len(sizes) == len(endings)
        if not is_whole or not set(endings) <= set(get_args(Ending)):
            return None
        if (
            not isinstance(key, str)
            or not isinstance(model, str)
            or not isinstance(name, int | str)
        ):
            return None
        return Answer(key, model, name, turns, endings, sizes)


def _all(value: Any, kind: type) -> tuple[Any, ...]:
    """A list whose entries are all of a kind; empty if it is something else."""
    is_list = isinstance(value, list) and all(isinstance(one, kind) for one in value)
    return tuple(value) if is_list else ()


@dataclass(frozen=True)
class AnswerSettings:
    """What decides an answer beside the model and the question.

    Attributes:
        options: How the models answer.
        template_sha256: Of the chat template.
        dtype: Of the weights.
        load_in_4bit: Whether the base is quantised.
    """

    options: AnswerOptions
    template_sha256: str
    dtype: str
    load_in_4bit: bool

    @staticmethod
    def of(options: AnswerOptions, judged: JudgedOptions, template: str) -> "AnswerSettings":
        """Those of one model.

        Args:
            options: How the models answer.
            judged: How they are loaded.
            template: Text of the model's chat template.
        """
        sha256 = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
        return AnswerSettings(options, sha256, judged.dtype, judged.load_in_4bit)

    def key(self, question: Question) -> str:
        """What must be the same for an answer to be used again."""
        return json_sha256(
            {
                "question_id": str(
                    question.question_id
                ),  # of two with equal turns, each has its own
                "turns": question.turns,
                "temperature": self.options.temperature_of(question.category),
                "max_new_tokens": self.options.max_new_tokens,
                "answer_batch_size": self.options.answer_batch_size,
                "answer_seed": self.options.answer_seed,
                "template_sha256": self.template_sha256,
                "dtype": self.dtype,
                "load_in_4bit": self.load_in_4bit,
            }
        )


def kept_answers(path: Path, model_sha256: str) -> tuple[dict[str, Answer], int]:
    """Key -> answer that a file holds of a model, and how many of its lines are damaged."""
    rows, num_damaged = read_lines(path)
    found = [Answer.of(row) for row in rows]
    whole = [one for one in found if one is not None]
    num_damaged += len(found) - len(whole)
    return {one.key: one for one in whole if one.model_sha256 == model_sha256}, num_damaged


def batches(
    questions: Sequence[Question], options: AnswerOptions
) -> Iterator[tuple[float, list[Question]]]:
    """Temperature and questions of each batch: questions of one temperature, in their order."""
    by_temperature: dict[float, list[Question]] = {}
    for one in questions:
        by_temperature.setdefault(options.temperature_of(one.category), []).append(one)
    size = options.answer_batch_size
    for temperature, same in by_temperature.items():
        for start in range(0, len(same), size):
            yield temperature, same[start : start + size]
