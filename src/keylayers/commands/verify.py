# SPDX-License-Identifier: Apache-2.0
"""`keylayers verify`: the mask curve of a ranking, compared with random and reversed orders."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App

from keylayers.commands.config import FLAT, FromRanking, flat, flat_values
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.progress import Progress, Silent
from keylayers.ranges import check_at_least
from keylayers.training.options import LOSS_UNITS, ObjectiveOptions, check_kto_batch

if TYPE_CHECKING:
    from transformers import Trainer

    from keylayers.ranking.curve import MaskCurve
    from keylayers.ranking.ranking import Ranking
    from keylayers.ranking.verification import Verification
    from keylayers.updates import Update

NUM_LEAVE_ONE_OUT_EXAMPLES = 64
EXAMPLES = """Examples:

```
keylayers verify --ranking out
keylayers verify --ranking out --leave-one-out --margin 0.02
keylayers verify --ranking r.json --model base --adapter my-adapter --data chats.jsonl
```
"""


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """How a ranking is verified.

    Attributes:
        points: Points on each mask curve, from no module to all modules.
        random_orders: Number of random orders that serve as the control.
        order_seed: Seed of the random orders.
        leave_one_out: Also measure the leave-one-out order. It takes one forward pass per module
            and batch, which is slow on large models.
        margin: How much worse than all modules the recommended budget may be, as a share of the
            reduction of the held-out loss by the fine-tune.
        eval_batch_size: Largest number of held-out examples per batch.
    """

    points: int = 15
    random_orders: int = 5
    order_seed: int = 0
    leave_one_out: bool = False
    margin: float = 0.05
    eval_batch_size: int = 8

    def __post_init__(self) -> None:
        check_at_least("points", self.points, 2)
        check_at_least("random_orders", self.random_orders, 1)
        check_at_least("eval_batch_size", self.eval_batch_size, 1)
        if not 0 <= self.margin < 1:
            raise ConfigError(f"`margin` must be a share from 0 to below 1, got {self.margin}")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """All options of a verification."""

    model: Annotated[ModelOptions, flat("Model")]
    data: Annotated[DataOptions, flat("Data")]
    update: Annotated[UpdateOptions, flat("An update that exists already")] = UpdateOptions()
    curve: Annotated[CurveOptions, flat("Measuring")] = CurveOptions()
    objective: Annotated[ObjectiveOptions, flat("Objective")] = ObjectiveOptions()

    def __post_init__(self) -> None:
        check_kto_batch("eval_batch_size", self.curve.eval_batch_size, self.objective)


app = App(
    help_epilogue=EXAMPLES,
    help_format="markdown",
    help_formatter=FromRanking("verify"),
    usage="Usage: keylayers verify --ranking PATH [OPTIONS]",
)


@app.default
def verify(
    *,
    ranking: Path,
    options: Annotated[VerifyOptions, FLAT],
    output: Path | None = None,
    config: Path | None = None,
) -> None:
    """Measure a ranking: held-out loss with only the best modules' updates kept.

    Nothing is trained. Shows the mask curve with random orders and the reverse order for
    comparison, and the smallest budget that is nearly as good as all modules, which
    `train --budget auto` takes. Model, update and data default to those of the ranking. Writes
    verification.json next to the ranking.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        output: Folder for verification.json and a copy of the ranking. Default: verification.json
            is written next to the ranking.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.ranking.verification import verification_file
    from keylayers.report.curve import verification_report

    found = run(ranking, options, ConsoleProgress(), output=output)
    console = stdout()
    console.print(verification_report(found))
    console.print(f"\nwritten to {verification_file(output or ranking)}", markup=False)


def run(
    ranking: str | Path,
    options: VerifyOptions,
    progress: Progress | None = None,
    *,
    output: Path | None = None,
) -> "Verification":
    """Measure the mask curve of a ranking, and write verification.json.

    With the options of the ranking's own run, which the command line takes over, neither stage 1
    nor the scores saw the held-out examples. An error leaves nothing behind.
    """
    from keylayers.files import output_folder
    from keylayers.ranking.ranking import FILE, Ranking
    from keylayers.ranking.verification import verification_file

    progress = progress or Silent()
    loaded = Ranking.load(ranking)
    if output is None:
        found = _verification(loaded, options, progress)
        found.save(verification_file(ranking))
        return found
    with output_folder(output):
        found = _verification(loaded, options, progress)
        loaded.save(output / FILE)
        found.save(verification_file(output))
    return found


def _verification(loaded: "Ranking", options: VerifyOptions, progress: Progress) -> "Verification":
    from keylayers.commands.session import Session
    from keylayers.files import json_sha256
    from keylayers.ranking.verification import Verification

    objective, wanted = options.objective, options.curve
    session = Session(options.model, options.data, objective.objective, progress, ranking=loaded)
    tuned = session.open_update(options.update, loaded)
    trainer = session.loss_trainer(tuned.model, objective, wanted.eval_batch_size)
    curves = _Curves(trainer, tuned.updates, wanted.points, progress)
    order = [module.name for module in loaded.ordered()]
    best_first = curves.measure(order, "best first")
    worst_first = curves.measure(order[::-1], "worst first")
    names = [module.name for module in loaded.modules]  # the same orders for every ranking
    shuffled = tuple(
        random.Random(f"{wanted.order_seed} {index}").sample(names, len(names))
        for index in range(wanted.random_orders)
    )
    return Verification(
        ranking_sha256=json_sha256(loaded.to_json()),
        best_first=best_first,
        worst_first=worst_first,
        random=tuple(
            curves.measure(order, f"random order {number}")
            for number, order in enumerate(shuffled, start=1)
        ),
        leave_one_out=curves.leave_one_out() if wanted.leave_one_out else None,
        margin=wanted.margin,
        provenance={
            **session.record,
            **tuned.record,
            "options": flat_values(options),
            "loss_unit": LOSS_UNITS[objective.objective],
        },
    )


@dataclass(frozen=True)
class _Curves:
    """Mask curves of several orders, at the same counts."""

    trainer: "Trainer"
    updates: "Sequence[Update]"
    points: int
    progress: Progress

    def measure(self, order: Sequence[str], title: str) -> "MaskCurve":
        """The curve that keeps the first modules of `order`."""
        from keylayers.evaluation.mask_curve import mask_curve
        from keylayers.training.objectives import prepared_examples

        points = min(self.points, len(self.updates) + 1)
        with self.progress.stage(f"mask curve: {title}", points) as on_step:
            return mask_curve(
                self.trainer,
                self.updates,
                order,
                prepared_examples(self.trainer)["held_out"],
                num_points=points,
                on_step=on_step,
            )

    def leave_one_out(self) -> "MaskCurve":
        """The curve of the order by leave-one-out, on a few batches of the mask's examples."""
        from keylayers.scores.score_modules import score_modules
        from keylayers.scores.scoring_options import scoring_options

        batch_size = self.trainer.args.per_device_train_batch_size
        num_batches = -(-NUM_LEAVE_ONE_OUT_EXAMPLES // batch_size)
        options = scoring_options("leave-one-out", mask_batches=num_batches)
        num_passes = (len(self.updates) + 1) * num_batches
        with self.progress.stage("scoring: leave-one-out", num_passes) as on_step:
            found = score_modules(self.trainer, self.updates, options, on_step)
        by_name = dict(zip(found.module_names, found.scores, strict=True))
        return self.measure(sorted(by_name, key=lambda name: -by_name[name]), "leave-one-out")
