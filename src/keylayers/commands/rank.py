# SPDX-License-Identifier: Apache-2.0
"""`keylayers rank`: stage 1 fine-tunes all modules, stage 2 scores their updates."""

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App

from keylayers.commands.config import FLAT, flat, flat_values
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError, RankingError
from keylayers.files import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.progress import Progress, Silent
from keylayers.scores.scoring_options import ScoringOptions
from keylayers.training.options import LOSS_UNITS, StabilityOptions, TrainingOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Trainer

    from keylayers.commands.fine_tuning import Tuned
    from keylayers.commands.session import Session
    from keylayers.ranking.ranking import Ranking
    from keylayers.scores.task import ModuleScores
    from keylayers.updates import Update
    from keylayers.updates.existing import TunedModel

EXAMPLES = """Examples:

```
keylayers rank --model meta-llama/Llama-3.2-1B --data tatsu-lab/alpaca --output out
keylayers rank --model base --data chats.jsonl --adapter my-adapter
keylayers rank --model base --tuned instruct --data chats.jsonl --mask-batches 8
keylayers rank --config rank.yaml --seed 1
```
"""


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """All options of a ranking run."""

    model: Annotated[ModelOptions, flat("Model")]
    data: Annotated[DataOptions, flat("Data")]
    update: Annotated[UpdateOptions, flat("An update that exists already")] = UpdateOptions()
    training: Annotated[TrainingOptions, flat("Fine-tuning")] = TrainingOptions()
    stability: Annotated[StabilityOptions, flat("When stage 1 ends")] = StabilityOptions()
    scoring: Annotated[ScoringFlags, flat("Scoring")] = ScoringFlags()

    def __post_init__(self) -> None:
        if self.has_stage_1:
            self.training.check_weights(self.model)
        elif self.update.tuned is not None and self.model.load_in_4bit:
            raise ConfigError(
                "`load_in_4bit` must be left out with `tuned`: the difference of two checkpoints "
                "needs the base's own weights"
            )

    @property
    def has_stage_1(self) -> bool:
        """Whether the update is still to be made."""
        return self.update == UpdateOptions()


app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def rank(
    *,
    options: Annotated[RankOptions, FLAT],
    output: Path = Path("out"),
    stage_1: Path | None = None,
    config: Path | None = None,
) -> None:
    """Rank the modules of a model for a fine-tune.

    Stage 1 fine-tunes all modules with LoRA until the loss is stable; stage 2 freezes everything
    and scores the modules by gates on what the fine-tune added. With --adapter or --tuned only
    stage 2 runs. Writes ranking.json and stage 1's adapter.

    Args:
        output: Folder for ranking.json and the adapter.
        stage_1: Folder for stage 1's adapter, if several rankings share it: the first run trains
            it, the others reuse it.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.report.terminal import ranking_report

    ranking = run(options, output, ConsoleProgress(), stage_1_in=stage_1)
    console = stdout()
    console.print(ranking_report(ranking))
    console.print(f"\nwritten to {output / 'ranking.json'}", markup=False)


def run(
    options: RankOptions,
    output: Path,
    progress: Progress | None = None,
    *,
    stage_1_in: Path | None = None,
) -> "Ranking":
    """Run both stages, or stage 2 on an existing update, and write `output`/ranking.json.

    The same call continues a run that was stopped in stage 1 from its last checkpoint; the result
    is that of a run that was not stopped. An error leaves nothing behind. Stage 1's adapter is
    written to `stage_1_in`, by default `output`.
    """
    from keylayers.commands.session import Session
    from keylayers.files import check_replaceable, output_folder
    from keylayers.ranking.ranking import FILE
    from keylayers.training.rank_modules import to_ranking

    start = time.perf_counter()
    progress = progress or Silent()
    training = options.training
    with output_folder(output):
        folder = (stage_1_in or output) / stage_1_name(training)
        if options.has_stage_1:
            check_replaceable(folder)
        is_full = options.has_stage_1 and training.is_full
        session = Session(
            options.model, options.data, training.objective, progress, is_full=is_full
        )
        provenance = session.record | {"options": flat_values(options)}
        tuned = _find_update(session, options, folder)
        trainer = session.scoring_trainer(tuned.model, training)
        provenance |= tuned.record
        provenance["loss_unit"] = LOSS_UNITS[training.objective]
        provenance["held_out_loss_nats"] = _held_out_losses(trainer, tuned.updates)
        scoring = options.scoring.scoring()
        found = _score(trainer, tuned.updates, scoring, progress)
        provenance["seconds"] = {
            "stage_1": tuned.record.get("stage_1", {}).get("seconds", 0.0),
            "stage_2": found.seconds,
            "total": time.perf_counter() - start,
        }
        ranking = to_ranking(tuned.updates, found, scoring, provenance)
        ranking.save(output / FILE)
    return ranking


def stage_1_name(training: TrainingOptions) -> str:
    """The folder of stage 1's adapter or checkpoint."""
    return STAGE_1_CHECKPOINT if training.is_full else STAGE_1_ADAPTER


def _find_update(session: "Session", options: RankOptions, folder: Path) -> "TunedModel":
    """The model with the update to rank: an existing one, or that of stage 1 in `folder`."""
    from keylayers.model.sharding import is_sharded
    from keylayers.updates import adapter_updates
    from keylayers.updates.adalora import is_adalora
    from keylayers.updates.existing import TunedModel, existing_update

    towers, is_full = options.model.towers, options.training.is_full
    if not options.has_stage_1:
        return existing_update(session.fresh(), options.update, session.progress, towers)
    tuned, stage_1 = _stage_1(session, options, folder)
    if tuned is not None and not (is_full or is_adalora(tuned) or is_sharded(tuned)):
        return TunedModel(tuned, adapter_updates(tuned), {"stage_1": stage_1})
    del tuned  # frees its memory
    # Load the update again: a full fine-tune changed the base, AdaLoRA's file lacks the ranks that
    # it cut, and a trainer cannot be built on weights that are spread over processes.
    where = UpdateOptions(tuned=str(folder)) if is_full else UpdateOptions(adapter=str(folder))
    found = existing_update(session.fresh(), where, session.progress, towers)
    if not is_full:
        stage_1 |= {"adapter_sha256": found.record["adapter"]["weights_sha256"]}
    return TunedModel(found.model, found.updates, {"stage_1": stage_1})


def _stage_1(
    session: "Session", options: RankOptions, folder: Path
) -> "tuple[Tuned | None, dict[str, Any]]":
    """Train all modules and write them to `folder`, unless a run of the same inputs has.

    The tuned model, if it was trained, and the record of stage 1.
    """
    from keylayers.apply.saving import save_tuned
    from keylayers.commands.fine_tuning import FineTuning, inputs_sha256
    from keylayers.commands.repeat import how_it_was_made
    from keylayers.files import RECORD, remove_unfinished, unfinished
    from keylayers.ranking.record import read_run
    from keylayers.report.model_card import model_card

    training = options.training
    inputs = inputs_sha256(session, training, stability=asdict(options.stability))
    with contextlib.suppress(RankingError):
        found = read_run(folder / RECORD)
        if found.inputs_sha256 == inputs and found.stage_1 is not None:
            remove_unfinished(folder)
            session.progress.note(f"stage 1 of the same inputs is taken from {folder}")
            return None, found.content["stage_1"]
    with unfinished(folder) as before:
        fine_tuning = FineTuning(session, training, options.stability.stage_1_cap, before)
        tuned, stage_1 = fine_tuning.train_all(options.stability, inputs)
        made = flat_values(options)
        record = {"inputs_sha256": inputs, "options": made, "stage_1": stage_1}
        card = model_card(session.record | record, None, how_it_was_made("rank", made, None))
        save_tuned(tuned, session.tokenizer, folder, record, card)
    return tuned, stage_1


def _held_out_losses(trainer: "Trainer", updates: "Sequence[Update]") -> dict[str, float]:
    """Held-out loss with all gates closed (the base model) and with all open (the tuned model)."""
    from keylayers.evaluation.loss import held_out_loss
    from keylayers.gates import gated
    from keylayers.training.objectives import prepared_examples

    losses = {}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        with gated(trainer.model, updates, initial_score=value, link="identity"):
            losses[name] = held_out_loss(trainer, prepared_examples(trainer)["held_out"])
    return losses


def _score(
    trainer: "Trainer", updates: "Sequence[Update]", scoring: ScoringOptions, progress: Progress
) -> "ModuleScores":
    """Stage 2: the scores of the modules."""
    from keylayers.gates import group_modules
    from keylayers.scores.score_modules import score_modules

    num_gates = len(group_modules([update.module for update in updates], scoring.granularity))
    num_steps = scoring.num_steps(num_gates)
    with progress.stage("stage 2: scoring modules", num_steps) as on_step:
        return score_modules(trainer, updates, scoring, on_step)
