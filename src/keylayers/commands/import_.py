# SPDX-License-Identifier: Apache-2.0
"""`keylayers import`."""

from pathlib import Path

from keylayers.commands import sub_command
from keylayers.errors import OutputError
from keylayers.model.options import ModelOptions

app = sub_command("""\
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
