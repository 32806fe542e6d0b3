# SPDX-License-Identifier: Apache-2.0
"""evaluation.json: what was measured on which models, and how. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keylayers.errors import RankingError
from keylayers.evaluation.measures import Measure
from keylayers.files import write_json

EVALUATION = "evaluation.json"
FORMAT = "keylayers evaluation 1"


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it is recorded.

    Attributes:
        measures: All of them, of all models.
        models: What each model is, by its name in the tables; the base model first.
        reference: With which the others are compared beside the base model; None without others.
        notes: What a reader must know: what was cut, left out or not answered.
        provenance: Options, environment, data, tasks.
    """

    measures: tuple[Measure, ...]
    models: Mapping[str, Mapping[str, Any]]
    reference: str | None
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As the file holds it."""
        return {
            "format": FORMAT,
            "models": dict(self.models),
            "reference": self.reference,
            "measures": [one.to_json() for one in self.measures],
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        write_json(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Evaluation":
        """From a file, or from the folder that holds evaluation.json.

        Raises:
            RankingError: it is missing, damaged or something else.
        """
        path = Path(path)
        path = path / EVALUATION if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            return Evaluation(
                tuple(Measure.from_json(one) for one in content["measures"]),
                content["models"],
                content["reference"],
                tuple(content["notes"]),
                content["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RankingError(
                f"{str(path)!r} must be an evaluation by `keylayers eval`, but cannot be read: "
                f"{error}"
            ) from error
