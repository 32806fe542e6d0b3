# SPDX-License-Identifier: Apache-2.0
"""Problems with answers, from a file or the hub; fields and answers are recognised by their names.

JSON lines are read one by one, because answers of different types (a number here, a list there)
make no table.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keylayers.data.options import DataOptions
from keylayers.data.reading import opened
from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.evaluation.options import ProblemOptions
from keylayers.files import json_sha256

# Written from the hub's pages of these data sets, and tried on files of the same columns.
KNOWN = {  # name -> data set on the hub with its config, split
    "gsm8k": ("openai/gsm8k:main", "test"),
    "math-500": ("HuggingFaceH4/MATH-500", "test"),
    "aime": ("HuggingFaceH4/aime_2024", "train"),
}
QUESTIONS = ("problem", "question")
ANSWERS = ("answer", "final_answer", "expected_answer", "solution")
RESULT_MARK = "####"  # what GSM8K puts between the way and the result


@dataclass(frozen=True)
class Problem:
    """A problem and its answer.

    Attributes:
        text: The problem.
        answer: As text, in which `evaluation.answers` finds the answer.
    """

    text: str
    answer: str

    def sha256(self) -> str:
        """The hash of both."""
        return json_sha256([self.text, self.answer])


@dataclass(frozen=True)
class ProblemSet:
    """Problems, each once.

    Attributes:
        name: In tables.
        problems: In the order of the file.
        note: How many there are, and what was left out.
    """

    name: str
    problems: tuple[Problem, ...]
    note: str


def check_split(options: ProblemOptions) -> None:
    """Raise a ConfigError for a split that is given and that no set of problems is read by."""
    sources, split = options.problems, options.problems_split
    if split == ProblemOptions.problems_split or any(not _is_fixed(one) for one in sources):
        return
    raise ConfigError(
        f"`problems_split` must be left out unless a set is owner/name on the hub, got {split!r} "
        f"with {', '.join(sources)}; files have no splits, and {', '.join(KNOWN)} have their own"
    )


def _is_fixed(source: str) -> bool:
    return source in KNOWN or Path(source).expanduser().is_file()


def load_problems(source: str, split: str, limit: int | None) -> ProblemSet:
    """A set of problems.

    Args:
        source: One of `KNOWN`, a file, or a name on the hub.
        split: Of a set on the hub that is not one of `KNOWN`.
        limit: Use only the first so many.

    Raises:
        DataError: no such set, no column with problems or answers, or no usable row.
    """
    path = Path(source).expanduser()
    is_file = path.is_file()
    if not is_file and ("/" not in source or path.suffix) and source not in KNOWN:
        raise DataError(
            f"`problems` must be {', '.join(KNOWN)}, a file, or owner/name on the hub, got "
            f"{source!r}, which is none of them{did_you_mean(source, KNOWN)}"
        )
    if is_file and path.suffix == ".jsonl":
        found = list(_usable(_json_lines(path), source))
    else:
        data, split = (str(path), "train") if is_file else KNOWN.get(source, (source, split))
        with opened(DataOptions(data=data, data_split=split)) as table:
            found = list(_usable(table.rows(), source))
    problems = [one for one in found if one is not None]
    distinct = tuple(dict.fromkeys(problems))
    if not distinct:
        raise DataError(f"`problems` must hold problems with answers, got none in {source!r}")
    name = path.stem if is_file else source
    counts = {
        "with an answer of no known form, or none": len(found) - len(problems),
        "that are there twice": len(problems) - len(distinct),
    }
    left_out = [f"{number} {reason}" for reason, number in counts.items() if number]
    note = f"{name}: {len(distinct[:limit])} problems"
    if left_out:
        note += f"; of all in the set, left out are {' and '.join(left_out)}"
    return ProblemSet(name, distinct[:limit], note)


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{str(path)!r} must be readable UTF-8 text, but is not: {error}"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"every line of {str(path)!r} must be JSON, but line {number} is not: {error}"
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"every line of {str(path)!r} must be an object with problem and answer, but line "
                f"{number} is a {type(row).__name__}"
            )
        yield row


def _usable(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Problem | None]:
    """A problem for each row; None where its answer has no known form."""
    for number, row in enumerate(rows, start=1):
        fields = {str(name).lower(): value for name, value in row.items()}
        question = next((one for one in QUESTIONS if one in fields), None)
        answer = next((one for one in ANSWERS if one in fields), None)
        if question is None or answer is None:
            raise DataError(
                f"every problem must have {' or '.join(QUESTIONS)}, and {', '.join(ANSWERS)}, but "
                f"row {number} of {source!r} has {', '.join(map(str, row)) or 'nothing'}; rename "
                f"its fields"
            )
        text, wanted = fields[question], _answer(fields[answer], is_solution=answer == "solution")
        yield Problem(text, wanted) if isinstance(text, str) and wanted else None


def _answer(value: Any, *, is_solution: bool) -> str | None:
    """An answer as a text in which it is found: boxed, unless it is somewhere in a solution."""
    if isinstance(value, list) and value:
        parts = [_plain(one) for one in value]
        plain = None if None in parts else ", ".join(part for part in parts if part)
    else:
        plain = _plain(value)
    if not plain:
        return None
    if is_solution and RESULT_MARK not in plain:
        return plain
    plain = plain.split(RESULT_MARK)[-1].strip().rstrip(".").strip()
    if len(plain) > 2 and plain[0] == plain[-1] == "$" and plain.count("$") == 2:
        plain = plain[1:-1]
    return f"\\boxed{{{plain}}}" if plain else None


def _plain(value: Any) -> str | None:
    if isinstance(value, str):
        return value.strip()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else None
