# SPDX-License-Identifier: Apache-2.0
"""`keylayers import`: a ranking from a scan file of Spectrum (`snr_results_*.json`).

A scan holds a name, a ratio and a type for each weight of a model, norms and embeddings included,
but no sizes. These come from the model's config; no weights are loaded. A ratio is infinite if no
singular value lies below the noise; it ranks first of its kind, as in Spectrum.
"""

from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, RootModel

from keylayers.commands import sub_command
from keylayers.environment import environment
from keylayers.errors import OutputError, RankingError
from keylayers.files import json_sha256
from keylayers.model.options import ModelOptions
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.validation import Part, Text, read_part

app = sub_command("""\
keylayers import snr_results_mistralai-Mistral-7B-v0.1.json --model mistralai/Mistral-7B-v0.1
keylayers show ranking.json --budget 0.3
""")


@app.default
def import_(
    scan: Path, /, *, model: str, revision: str | None = None, output: Path = Path("ranking.json")
) -> None:
    """Make a ranking of a scan by Spectrum: it can be shown, compared, trained on and exported.

    A module's score is its place among those of its kind, as Spectrum selects. Norms, embeddings
    and the head are left out. Only the model's config is read, for the sizes.

    Args:
        scan: Spectrum's snr_results_*.json.
        model: The model that was scanned: a name on the Hub or a folder with its config.json.
        revision: Revision of a model on the Hub.
        output: Ranking file to write.
    """
    from keylayers.commands.console import stdout

    ranking = _spectrum_ranking(scan, ModelOptions(model=model, revision=revision))
    if output.exists():
        raise OutputError(f"the ranking must be a new file, but {str(output)!r} is there already")
    ranking.save(output)
    taken = ranking.made_by.imported
    assert taken is not None
    stdout().print(
        f"{len(ranking.modules)} modules ranked, {taken.num_infinite} of them with an infinite "
        f"ratio; {taken.num_left_out} other weights left out; {output} written",
        markup=False,
    )


class _Row(Part):
    snr: Annotated[float, Field(ge=0, allow_inf_nan=True)]


class _Scan(RootModel[dict[Text, _Row]]):
    """A row for each weight."""

    model_config = ConfigDict(strict=True)


def _spectrum_ranking(path: Path, source: ModelOptions) -> Ranking:
    """The ranking in the scan file of a model; scores are those of `--method spectrum`."""
    from keylayers.model.loading import empty_model
    from keylayers.model.modules import map_modules
    from keylayers.scores.spectrum import shares_of_kind

    scan = read_part(_Scan, path, "the scan", "python spectrum.py")  # of Spectrum's repository
    ratios = {name: row.snr for name, row in scan.root.items()}
    if not ratios:
        raise RankingError(f"{str(path)!r} must be a scan of a model's weights, but it is empty")
    infos = map_modules(empty_model(source))
    missing = [info.name for info in infos if info.name not in ratios]
    if missing:
        raise RankingError(
            f"{str(path)!r} must be a scan of {source.model}, but it lacks {len(missing)} of its "
            f"{len(infos)} modules, first {missing[0]}"
        )
    known = {info.name for info in infos}
    blocks = tuple({f"{info.stack}." for info in infos})
    others = [name for name in ratios if name.startswith(blocks) and name not in known]
    if odd := [name for name in others if "norm" not in name]:
        raise RankingError(
            f"{str(path)!r} must be a scan of {source.model}, but that model has no {odd[0]}; name "
            f"the model that was scanned"
        )
    found = [ratios[info.name] for info in infos]
    scores = shares_of_kind(found, [info.projection for info in infos])
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
    modules = tuple(map(RankedModule.of, infos, scores))
    return Ranking(modules, "spectrum", provenance=made_by)
