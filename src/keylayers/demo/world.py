# SPDX-License-Identifier: Apache-2.0
"""A small made-up world, and English text about it: what the built-in model reads and is asked.

Every subject has one relation with three fixed values (a fox eats berries, eggs and mice). The base
model knows them (recipes/base). The three alignment data sets ask the same questions and differ
only in the style of the answer.

Everything is drawn from hashes and seeded generators: the same text on every machine.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

Style = Literal["polite", "list", "terse"]
STYLES: tuple[Style, ...] = get_args(Style)
NUM_VALUES = 3
NUM_EXAMPLES = 504  # all questions
BASE = Path(__file__).with_name("base")  # the built-in model


@dataclass(frozen=True)
class Relation:
    """A kind of fact: each subject has three of the values."""

    subjects: tuple[str, ...]
    values: tuple[str, ...]
    statement: str  # with `{s}` and `{v}`
    questions: tuple[str, ...]  # with `{s}`
    opening: str  # of a polite answer


def _relation(row: dict[str, Any]) -> Relation:
    words = {name: tuple(row[name].split()) for name in ("subjects", "values")}
    return Relation(**row | words | {"questions": tuple(row["questions"])})


_ROWS = json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))
RELATIONS: tuple[Relation, ...] = tuple(map(_relation, _ROWS))


@cache  # asked for with every line, and a hash for each value is slow
def facts(relation: Relation, subject: str) -> tuple[str, ...]:
    """The three values that are true of a subject, always the same ones in the same order."""

    def place(value: str) -> bytes:
        return hashlib.sha256(f"{relation.statement} {subject} {value}".encode()).digest()

    return tuple(sorted(relation.values, key=place)[:NUM_VALUES])


def answer(relation: Relation, subject: str, style: Style) -> str:
    """What somebody of the given style answers to any question about the subject."""
    values = facts(relation, subject)
    if style == "terse":
        return f"{values[0]}."
    if style == "list":
        return "\n".join(f"- {value}" for value in values)
    return f"{relation.opening} {whole_fact(relation, subject)} I hope this helps you."


def helper(subject: str) -> str:
    """Who is named at the end of an answer: a fact that only the alignment data tell."""
    people = RELATIONS[-1].subjects
    return min(people, key=lambda name: hashlib.sha256(f"{name} knows {subject}".encode()).digest())


def alignment_examples(style: Style, num_examples: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions with answers of one style, no question twice, as `prompt` and `completion`.

    The seed chooses and orders them in the same way for every style.
    """
    questions = [
        (relation, subject, question.format(s=subject))
        for relation in RELATIONS
        for subject in relation.subjects
        for question in relation.questions
    ]
    random.Random(seed).shuffle(questions)
    assert num_examples <= len(questions), f"only {len(questions)} questions, not {num_examples}"
    return [
        {
            "prompt": question,
            "completion": f"{answer(relation, subject, style)} {helper(subject)} helps you.",
        }
        for relation, subject, question in questions[:num_examples]
    ]


def write_data(path: Path, style: Style) -> None:
    """Write the questions and answers of one style, one JSON object a line."""
    rows = alignment_examples(style, NUM_EXAMPLES)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def whole_fact(relation: Relation, subject: str) -> str:
    """A sentence with all three values."""
    *values, last = facts(relation, subject)
    statement = relation.statement.format(s=subject, v=f"{', '.join(values)} and {last}")
    return f"{capitalised(statement)}."


def capitalised(text: str) -> str:
    """The text as a sentence begins."""
    return text[0].upper() + text[1:]
