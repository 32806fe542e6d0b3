# SPDX-License-Identifier: Apache-2.0
"""A ranking from Spectrum's own scan file (`snr_results_*.json`), without loading any weights.

A scan holds a name, a ratio and a type for each weight of a model, norms and embeddings included,
but no sizes. These come from the model's config. A ratio is infinite if no singular value lies
below the noise; it ranks first of its kind, as in Spectrum.
"""

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, RootModel

from keylayers.environment import environment
from keylayers.errors import RankingError
from keylayers.files import json_sha256
from keylayers.model.loading import empty_model
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.scores.spectrum import shares_of_kind
from keylayers.validation import Part, Text, read_part

COMMAND = "python spectrum.py"  # of Spectrum's own repository


def spectrum_ranking(path: Path, source: ModelOptions) -> Ranking:
    """The ranking in the scan file of a model; scores are those of `--method spectrum`."""
    ratios = _ratios(path)
    infos = map_modules(empty_model(source))
    missing = [info.name for info in infos if info.name not in ratios]
    if missing:
        raise RankingError(
            f"{str(path)!r} must be a scan of {source.model}, but it lacks {len(missing)} of its "
            f"{len(infos)} modules, first {missing[0]}"
        )
    known = {info.name for info in infos}
    blocks = tuple({f"{info.stack}." for info in infos})
    odd = [name for name in ratios if name.startswith(blocks) and name not in known]
    if odd := [name for name in odd if "norm" not in name]:
        raise RankingError(
            f"{str(path)!r} must be a scan of {source.model}, but that model has no {odd[0]}; name "
            f"the model that was scanned"
        )
    found = [ratios[info.name] for info in infos]
    scores = shares_of_kind(found, [info.projection for info in infos])
    modules = map(RankedModule.of, infos, scores)
    made_by = {
        "environment": environment(),
        "model": {"name": source.model, "revision": source.revision},
        "imported": {
            "tool": "Spectrum",
            "file": path.name,
            "content_sha256": json_sha256({name: str(value) for name, value in ratios.items()}),
            "num_infinite": sum(value == float("inf") for value in found),
            "num_left_out": len(ratios) - len(found),
        },
    }
    return Ranking(tuple(modules), "spectrum", provenance=made_by)


class _Row(Part):
    snr: Annotated[float, Field(ge=0, allow_inf_nan=True)]


class _Scan(RootModel[dict[Text, _Row]]):
    """A row for each weight."""

    model_config = ConfigDict(strict=True)


def _ratios(path: Path) -> dict[str, float]:
    """Name -> signal-to-noise ratio."""
    scan = read_part(_Scan, path, "the scan", COMMAND)
    ratios = {name: row.snr for name, row in scan.root.items()}
    if not ratios:
        raise RankingError(f"{str(path)!r} must be a scan of a model's weights, but it is empty")
    return ratios
