# SPDX-License-Identifier: Apache-2.0
"""`keylayers import`."""

from pathlib import Path

<<<<<<< HEAD
from keylayers.commands import sub_command
from keylayers.errors import OutputError
=======
from cyclopts import App
from pydantic import ConfigDict, Field, RootModel

from keylayers.errors import OutputError, RankingError
>>>>>>> 4f0d06d (keylayers targets: which modules a training config trains, without weights)
from keylayers.model.options import ModelOptions

<<<<<<< HEAD
app = sub_command("""\
=======
if TYPE_CHECKING:
    from keylayers.ranking.ranking import Ranking

EXAMPLES = """Examples:

```
>>>>>>> 4f0d06d (keylayers targets: which modules a training config trains, without weights)
keylayers import snr_results_mistralai-Mistral-7B-v0.1.json --model mistralai/Mistral-7B-v0.1
keylayers show ranking.json --budget 0.3
""")


@app.default
def import_(
    scan: Path, /, *, model: str, revision: str | None = None, output: Path = Path("ranking.json")
) -> None:
    """Make a ranking of a scan by Spectrum: it can be shown, compared, trained on and exported.

    Scores are places inside each kind of module, as Spectrum selects; of norms, embeddings and
    the head nothing is taken. Only the model's config is read, for the sizes.

    Args:
        scan: Spectrum's snr_results_*.json.
        model: The model that was scanned: a name on the hub or a folder with its config.json.
        revision: Of a model on the hub.
        output: Ranking file to write.
    """
    from keylayers.commands.console import stdout
    from keylayers.commands.run_import import spectrum_ranking

    ranking = spectrum_ranking(scan, ModelOptions(model=model, revision=revision))
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
<<<<<<< HEAD
=======


def spectrum_ranking(path: Path, source: ModelOptions) -> "Ranking":
    """The ranking in a scan file: scores as those of `--method spectrum`.

    Args:
        path: The scan file.
        source: The model that was scanned; its config is read.

    Raises:
        RankingError: the file is damaged, empty, no scan, or of another model.
        ModelError: there is no such config.
    """
    from keylayers.environment import environment
    from keylayers.files import json_sha256
    from keylayers.model.loading import empty_model
    from keylayers.model.modules import map_modules
    from keylayers.ranking.ranked_module import RankedModule
    from keylayers.ranking.ranking import Ranking
    from keylayers.scores.spectrum import shares_of_kind

    ratios = _ratios(path)
    infos = map_modules(empty_model(source))
    missing = [info.name for info in infos if info.name not in ratios]
    if missing:
        raise RankingError(
            f"{str(path)!r} must be a scan of {source.model}, but it lacks {len(missing)} of its "
            f"{len(infos)} modules, first {missing[0]}"
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
    scan = validated(_Scan, read_json(path, "the scan", COMMAND), str(path), COMMAND)
    ratios = {name: row.snr for name, row in scan.root.items()}
    if not ratios:
        raise RankingError(f"{str(path)!r} must be a scan of a model's weights, but it is empty")
    return ratios
>>>>>>> 4f0d06d (keylayers targets: which modules a training config trains, without weights)
