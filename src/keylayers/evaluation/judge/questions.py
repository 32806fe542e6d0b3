# SPDX-License-Identifier: Apache-2.0
"""Questions of one or several turns, and reference answers, in the files of FastChat.

A line is `{"question_id": 81, "category": "writing", "turns": ["...", "..."]}`; one of a file of
references `{"question_id": 101, "choices": [{"turns": ["...", "..."]}]}`. Needs no torch.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keylayers.errors import DataError, did_you_mean
from keylayers.evaluation.judge.options import AnswerOptions

# Name -> (kind of repository, repository, file). The space of the benchmark's authors holds their
# question file as it is; no repository of theirs is known to hold Vicuna's questions.
ON_HUB: Mapping[str, tuple[str, str, str]] = {
    "mt-bench": ("space", "lmsys/mt-bench", "data/mt_bench/question.jsonl"),
}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question_id: As in its file.
        category: As in its file.
        turns: What the user says, turn by turn.
        references: A good answer to each turn, where there is one.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str | None, ...]


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one run, and what a record says of them."""

    questions: tuple[Question, ...]
    record: Mapping[str, Any]

    @property
    def categories(self) -> list[str]:
        """In the order of the file."""
        return list(dict.fromkeys(question.category for question in self.questions))

    @property
    def num_turns(self) -> int:
        """Of the longest question."""
        return max(len(question.turns) for question in self.questions)


def read_questions(options: AnswerOptions) -> QuestionSet:
    """The questions that are asked, with their reference answers.

    Raises:
        DataError: a file cannot be read, or a line is no question or no reference answer.
    """
    path = _question_file(options.questions)
    content = _content(path, "questions")
    questions = _parse_questions(path, content)
    references: dict[str, tuple[str | None, ...]] = {}
    record: dict[str, Any] = {
        "name": options.questions,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if options.references is not None:
        of_references = Path(options.references)
        content = _content(of_references, "references")
        references = _parse_references(of_references, content)
        record["references_sha256"] = hashlib.sha256(content).hexdigest()
        if references.keys().isdisjoint(str(one.question_id) for one in questions):
            raise DataError(
                f"`references` must hold answers to the questions asked, but no question_id of "
                f"{options.references!r} is one of {options.questions!r}"
            )
    chosen = _first_of_each_category(questions, options.max_questions)
    asked = tuple(_with_references(one, references) for one in chosen)
    record["num_questions"] = len(asked)
    record["num_with_reference"] = sum(any(one.references) for one in asked)
    record["categories"] = dict(Counter(one.category for one in asked))
    return QuestionSet(asked, record)


def _question_file(name: str) -> Path:
    """The file, fetched from the hub if it is one that has a name there."""
    if name not in ON_HUB or Path(name).exists():
        return Path(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    kind, repository, file = ON_HUB[name]
    try:
        return Path(hf_hub_download(repository, file, repo_type=kind))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the questions {name!r} must be on the hub, in {file} of the {kind} {repository}, but "
            f"could not be fetched: {reason}; give a file instead"
        ) from error


def _content(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        near = did_you_mean(str(path), ON_HUB) if option == "questions" else ""
        known = " or the name mt-bench" if option == "questions" else ""
        raise DataError(
            f"`{option}` must be a file of JSON lines{known}, but {str(path)!r} cannot be read: "
            f"{reason}{near}"
        ) from error


def _parse_questions(path: Path, content: bytes) -> list[Question]:
    questions: dict[str, Question] = {}
    for number, row in _rows(path, content):
        name: Any = row.get("question_id")
        category: Any = row.get("category")
        turns: Any = row.get("turns")
        is_category = isinstance(category, str) and category.isprintable() and category.strip()
        if not _is_id(name) or not is_category or not _are_texts(turns):
            raise DataError(
                f"every line of {str(path)!r} must be a question as FastChat writes it, with "
                f"question_id, category and turns, but line {number} is not"
            )
        if str(name) in questions:
            raise DataError(
                f"every question_id in {str(path)!r} must be there once, but {name!r} is there "
                f"again in line {number}"
            )
        none = (None,) * len(turns)
        questions[str(name)] = Question(name, category, tuple(turns), none)
    if not questions:
        raise DataError(f"`questions` must hold a question or more, but {str(path)!r} holds none")
    return list(questions.values())


def _parse_references(path: Path, content: bytes) -> dict[str, tuple[str | None, ...]]:
    """Question -> its reference answers, by turn."""
    references: dict[str, tuple[str | None, ...]] = {}
    for number, row in _rows(path, content):
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns") if isinstance(first, dict) else None
        if not _is_id(row.get("question_id")) or not isinstance(turns, list):
            turns = [None]
        if not all(isinstance(turn, str) and _is_text(turn) for turn in turns):
            raise DataError(
                f"every line of {str(path)!r} must hold a reference answer as FastChat writes it, "
                f"with question_id and choices that hold turns, but line {number} does not"
            )
        references[str(row["question_id"])] = tuple(turn.strip() or None for turn in turns)
    return references


def _rows(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of every line that is not blank."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # no UTF-8 is a ValueError too
            row = None
        if not isinstance(row, dict):
            raise DataError(
                f"every line of {str(path)!r} must be a JSON object, but line {number} is not"
            )
        yield number, row


def _is_id(value: Any) -> bool:
    is_text = isinstance(value, str) and value.isprintable() and bool(value.strip())
    return is_text or (isinstance(value, int) and not isinstance(value, bool))


def _are_texts(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(one, str) and one.strip() and _is_text(one) for one in value)


def _is_text(value: str) -> bool:
    """Whether it is whole characters: JSON can hold halves of them, which no file and model can."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_of_each_category(questions: list[Question], count: int | None) -> list[Question]:
    if count is None:
        return questions
    seen: Counter[str] = Counter()
    kept = []
    for one in questions:
        seen[one.category] += 1
        if seen[one.category] <= count:
            kept.append(one)
    return kept


def _with_references(
    question: Question, references: Mapping[str, tuple[str | None, ...]]
) -> Question:
    found = references.get(str(question.question_id), ())
    padded = (*found, *question.references)[: len(question.turns)]
    return Question(question.question_id, question.category, question.turns, padded)
