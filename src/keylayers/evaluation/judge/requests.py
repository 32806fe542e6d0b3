# SPDX-License-Identifier: Apache-2.0
"""What the judge is asked about the answers of some models: one prompt each. Needs no torch."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keylayers.evaluation.judge.options import EndpointOptions
from keylayers.evaluation.judge.prompts import comparison_prompt, rating_prompt
from keylayers.evaluation.judge.questions import Question, QuestionSet
from keylayers.files import json_sha256

# What a model said to each question, turn by turn; None where it has not answered yet.
Said = Mapping[str, Mapping[int | str, tuple[str, ...] | None]]


@dataclass(frozen=True)
class JudgeRequest:
    """One prompt for the judge.

    Attributes:
        key: Of prompt, judge and its settings: a reply under this key is never asked for again.
        prompt: What is sent.
        question_id: The question.
        turn: Which of its turns is judged, from 1.
        models: The model that is rated, or the two that are compared in the order shown.
        answers_sha256: Of what they said up to this turn.
        num_missing: Answers that the prompt lacks because they are not given yet.
    """

    key: str
    prompt: str
    question_id: int | str
    turn: int
    models: tuple[str, ...]
    answers_sha256: tuple[str, ...]
    num_missing: int = 0

    def about(self) -> dict[str, Any]:
        """What stands beside the reply in its file."""
        return {
            "key": self.key,
            "question_id": self.question_id,
            "turn": self.turn,
            "models": list(self.models),
            "answers_sha256": list(self.answers_sha256),
        }


def requests_for(
    asked: QuestionSet, labels: Sequence[str], said: Said, options: EndpointOptions
) -> list[JudgeRequest]:
    """All requests of a run, in a fixed order: by question, then by turn, then by model.

    Args:
        asked: The questions.
        labels: The models; in pairs each is compared with the first.
        said: Label -> question -> what it said.
        options: The judge, its settings and the mode.
    """
    shown: list[tuple[str, ...]] = [(label,) for label in labels]
    if options.mode == "pairwise":
        first = labels[0]
        shown = [pair for label in labels[1:] for pair in ((first, label), (label, first))]
    return [
        _request(question, turn, models, said, options)
        for question in asked.questions
        for turn in range(1, len(question.turns) + 1)
        for models in shown
    ]


def unique(requests: Sequence[JudgeRequest]) -> Iterator[JudgeRequest]:
    """Each request once: equal answers make equal prompts, and those are asked once."""
    seen: set[str] = set()
    for one in requests:
        if one.key not in seen or one.num_missing:
            seen.add(one.key)
            yield one


def _request(
    question: Question,
    turn: int,
    models: tuple[str, ...],
    said: Said,
    options: EndpointOptions,
) -> JudgeRequest:
    known = [said[label].get(question.question_id) for label in models]
    answers = [("",) * turn if one is None else one[:turn] for one in known]
    if options.mode == "single":
        prompt = rating_prompt(question, answers[0])
    else:
        prompt = comparison_prompt(question, answers[0], answers[1])
    decides = {
        "url": options.base_url,
        "model": options.judge_model,
        "temperature": options.judge_temperature,
        "max_tokens": options.judge_max_tokens,
        "prompt": prompt,
    }
    return JudgeRequest(
        key=json_sha256(decides),
        prompt=prompt,
        question_id=question.question_id,
        turn=turn,
        models=models,
        answers_sha256=tuple(_sha256(one) for one in answers),
        num_missing=turn * sum(one is None for one in known),
    )


def _sha256(answers: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(answers).encode()).hexdigest()
