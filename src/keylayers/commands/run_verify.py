# SPDX-License-Identifier: Apache-2.0
"""A verification: the mask curve of a ranking, compared with random and reversed orders."""

from contextlib import nullcontext
from pathlib import Path

from keylayers.commands.options import VerifyOptions
from keylayers.commands.session import Session
from keylayers.evaluation.verify import measured_curves
from keylayers.files import output_folder
from keylayers.progress import Progress
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.verification import Verification, verification_file


def run_verify(
    ranking: Path, options: VerifyOptions, progress: Progress, output: Path | None = None
) -> Verification:
    """Measure the mask curve of a ranking, and write verification.json."""
    loaded = Ranking.load(ranking)
    with nullcontext() if output is None else output_folder(output):
        session = Session(options, options.objective, progress, ranking=loaded)
        tuned = session.open_update(options.update, loaded)
        trainer = session.loss_trainer(tuned.model, options.curve.eval_batch_size)
        found = measured_curves(
            trainer,
            tuned.updates,
            loaded,
            trainer.eval_dataset["held_out"],
            options.curve,
            session.record | tuned.record,
            progress,
        )
        if output is not None:
            loaded.save(output / FILE)
        found.save(verification_file(output or ranking))
    return found
