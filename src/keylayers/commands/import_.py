# SPDX-License-Identifier: Apache-2.0
"""`keylayers import`: Spectrum's own scan files (`snr_results_*.json`) as rankings.

A scan holds a name, a ratio and a type for each weight of a model, norms and embeddings included,
but no sizes. These come from the model's config; no weights are loaded. A ratio is infinite if no
singular value lies below the noise; it ranks first of its kind, as in Spectrum.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App
from pydantic import ConfigDict, Field, RootModel

from keylayers.errors import ModelError, OutputError, RankingError
from keylayers.model.options import ModelOptions
from keylayers.validation import Part, Text, read_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from keylayers.ranking.ranking import Ranking

EXAMPLES = """Examples:

```
keylayers import snr_results_mistralai-Mistral-7B-v0.1.json --model mistralai/Mistral-7B-v0.1
keylayers show ranking.json --budget 0.3
```
"""

COMMAND = "python spectrum.py"  # of Spectrum's own repository
app = App(help_epilogue=EXAMPLES, help_format="markdown")


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
    from keylayers.model.modules import map_modules
    from keylayers.ranking.ranked_module import RankedModule
    from keylayers.ranking.ranking import Ranking
    from keylayers.scores.spectrum import shares_of_kind

    ratios = _ratios(path)
    infos = map_modules(_empty_model(source))
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
    scan = read_part(_Scan, path, "the scan", COMMAND)
    ratios = {name: row.snr for name, row in scan.root.items()}
    if not ratios:
        raise RankingError(f"{str(path)!r} must be a scan of a model's weights, but it is empty")
    return ratios


def _empty_model(source: ModelOptions) -> "PreTrainedModel":
    """The model's modules without their weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from keylayers.model.checkpoint import check_folder

    check_folder(source.model, "config.json", "a model")
    try:
        config = AutoConfig.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError) as error:
        first = " ".join(str(error).splitlines()[:1])
        raise ModelError(f"{source.model!r} must be a model with a config: {first}") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
