# SPDX-License-Identifier: Apache-2.0
"""Typed parts of JSON files, checked by pydantic; what is wrong is said in one line.

Types are strict: a text is no number and a boolean is no integer. Unknown keys are ignored.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from keylayers.errors import RankingError

T = TypeVar("T")

# `str` of pydantic refuses half a character, which the names of files may hold.
Text = InstanceOf[str]
ListOf = Annotated[tuple[T, ...], Field(strict=False)]  # strict would want a tuple
CountFromZero = Annotated[int, Field(ge=0)]
CountFromOne = Annotated[int, Field(ge=1, lt=2**31)]

PLAINLY = {  # types of pydantic's errors whose messages speak of Python
    "missing": "there",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "tuple_type": "a list",
    "is_instance_of": "text",  # of `Text`
    "too_long": "shorter",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "float_type": "a finite number",
}


class Part(BaseModel):
    """A JSON object that is read by its attributes."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


AnyPart = TypeVar("AnyPart", bound=BaseModel)


def read_part(part: type[AnyPart], path: Path, what: str, command: str) -> AnyPart:
    """A JSON file as a `part`; messages call the file `what` and say that `command` writes it."""
    return validated(part, read_json(path, what, command), str(path), command)


def read_json(path: Path, what: str, command: str) -> Any:
    """The parsed JSON of a file, which messages call `what` and which `command` writes."""
    name = repr(str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RankingError(
            f"{what} must exist, but there is no {name}; make it with `{command}`"
        ) from None
    except OSError as error:
        raise RankingError(f"{what} {name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RankingError(
            f"{name} must be whole JSON, but it is damaged or cut off ({error}); regenerate it "
            f"with `{command}`"
        ) from None


def validated(part: type[AnyPart], content: object, source: str, command: str) -> AnyPart:
    """Parsed JSON as a `part`; `source` and `command` say in a message where it comes from."""
    try:
        return part.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        place = repr("".join(steps).removeprefix("."))[1:-1]
        where = f"{source!r}: `{place:.80}`" if place else repr(source)
        said = re.sub("^(Value error, |Input should be )", "", first["msg"])
        what = PLAINLY.get(first["type"], said)
        came = "nothing" if first["type"] == "missing" else f"{first['input']!r:.40}"
        raise RankingError(
            f"{where} must be {what}, got {came}; fix it or regenerate it with `{command}`"
        ) from None
