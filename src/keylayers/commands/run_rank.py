# SPDX-License-Identifier: Apache-2.0
"""A ranking run: stage 1 fine-tunes all modules, stage 2 scores their updates."""

import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from keylayers import files
from keylayers.apply.extract import extract_adapter
from keylayers.commands.fine_tuning import FineTuning, inputs_sha256, num_trained, save_tuned
from keylayers.commands.options import RankOptions
from keylayers.commands.repeat import card_of
from keylayers.commands.session import Session, Tuned, TunedModel
from keylayers.errors import RankingError
from keylayers.evaluation.held_out import masked_losses
from keylayers.gates import gate_groups
from keylayers.model.options import UpdateOptions
from keylayers.model.sharding import is_sharded
from keylayers.model.weights import adapter_sha256, weights_sha256
from keylayers.progress import Progress
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.record import Stability, read_run
from keylayers.scores.score_modules import check_updates, score_modules
from keylayers.trainers.loss import finite
from keylayers.training.rank_modules import to_ranking
from keylayers.training.step_scores import StepScores
from keylayers.updates import ZERO, adapter_updates
from keylayers.updates.adalora import is_adalora


def run_rank(options: RankOptions, output: Path, progress: Progress, stage_1_in: Path) -> Ranking:
    """Run both stages, the first below `stage_1_in`, or stage 2 alone; write ranking.json."""
    start = time.perf_counter()
    training, scoring = options.training, options.scoring.scoring()
    with files.output_folder(output):
        is_full = options.has_stage_1 and training.is_full
        name = files.STAGE_1_CHECKPOINT if training.is_full else files.STAGE_1_ADAPTER
        folder = stage_1_in / name
        if options.has_stage_1 or options.is_extracted:
            files.check_replaceable(folder)
        session = Session(options, training, progress, is_full=is_full)
        tuned = _find_update(session, options, folder)
        trainer = session.trainer(tuned.model, training)
        with masked_losses(trainer, tuned.updates, trainer.eval_dataset["held_out"]) as loss:
            base, full = loss([]), loss(None)
        if base.losses == full.losses:
            progress.note(ZERO)
        num_steps = scoring.num_steps(len(gate_groups(tuned.updates, scoring.granularity)))
        with progress.stage("stage 2: scoring modules", num_steps) as on_step:
            found = score_modules(trainer, tuned.updates, scoring, on_step)
        provenance = {
            **session.record,
            **tuned.record,
            "held_out_loss_nats": {"base": base.mean, "tuned": full.mean},
            "seconds": {
                "stage_1": tuned.record.get("stage_1", {}).get("seconds", 0.0),
                "stage_2": found.seconds,
                "total": time.perf_counter() - start,
            },
        }
        ranking = to_ranking(tuned.updates, found, scoring, provenance)
        ranking.save(output / FILE)
    return ranking


def _find_update(session: Session, options: RankOptions, folder: Path) -> TunedModel:
    """The model with the update to rank: an existing one, or that of stage 1 in `folder`."""
    is_full = options.training.is_full
    if options.is_extracted:
        return _extracted(session, options, folder)
    if not options.has_stage_1:
        return session.existing_update(options.update)
    tuned, stage_1 = _stage_1(session, options, folder)
    if tuned is not None and not (is_full or is_adalora(tuned) or is_sharded(tuned)):
        return TunedModel(tuned, adapter_updates(tuned), {"stage_1": stage_1})
    del tuned  # frees its memory
    # Load the update again: a full fine-tune changed the base, AdaLoRA's file lacks the ranks that
    # it cut, and a trainer cannot be built on weights that are spread over processes.
    where = UpdateOptions(tuned=str(folder)) if is_full else UpdateOptions(adapter=str(folder))
    found = session.existing_update(where)
    if not is_full:
        stage_1 |= {"adapter_sha256": found.record["adapter"]["weights_sha256"]}
    return TunedModel(found.model, found.updates, {"stage_1": stage_1})


def _extracted(session: Session, options: RankOptions, folder: Path) -> TunedModel:
    """The base with the leading singular directions of the difference to the tuned checkpoint."""
    training, tuned = options.training, options.update.tuned
    assert tuned is not None
    model, extracted = extract_adapter(
        session.fresh(), tuned, training.lora_rank, session.progress, options.model.towers
    )
    session.progress.note(f"the adapter of the difference is in {folder}")
    record = {"options": session.record["options"], "extracted": extracted}
    card = card_of("rank", session.record | record, None)
    with files.unfinished(folder):
        save_tuned(model, session.tokenizer, folder, record, card)
    adapter = {"name": str(folder), "weights_sha256": adapter_sha256(model), "always_on": []}
    made_by = {"adapter": adapter, "extracted": extracted}
    return TunedModel(model, adapter_updates(model), made_by)


def _stage_1(
    session: Session, options: RankOptions, folder: Path
) -> tuple[Tuned | None, dict[str, Any]]:
    """The tuned model, unless `folder` has it of the same inputs already, and stage 1's record."""
    training = options.training
    inputs = inputs_sha256(session, training, stability=asdict(options.stability))
    with suppress(RankingError):
        found = read_run(folder / files.RECORD)
        if found.inputs_sha256 == inputs and found.stage_1 is not None:
            files.remove_unfinished(folder)
            session.progress.note(f"stage 1 of the same inputs is taken from {folder}")
            return None, found.content["stage_1"]
    with files.unfinished(folder) as before:
        sets = FineTuning(session, training, options.stability.stage_1_cap, folder, before)
        tuned, stage_1 = _train_all(sets, options, inputs)
        made_by = {key: session.record[key] for key in ("options", "data")}
        record = {"inputs_sha256": inputs, **made_by, "stage_1": stage_1}
        card = card_of("rank", session.record | record, None)
        save_tuned(tuned, session.tokenizer, folder, record, card)
    return tuned, stage_1


def _train_all(sets: FineTuning, options: RankOptions, inputs: str) -> tuple[Tuned, dict[str, Any]]:
    """Train all modules until the loss is stable; the model and the record of stage 1."""
    progress = sets.session.progress
    trainer = sets.trainer(sets.session.names, "stage-1")
    model, scores = trainer.model, StepScores()
    if isinstance(model, PeftModel):
        check_updates(adapter_updates(model), options.scoring.scoring())  # before the long part
        trainer.add_callback(scores)
    title = "stage 1, training all modules"
    result = sets.run(trainer, "stage-1", inputs, title, options.stability)
    seen = Stability.model_validate(result.stability)
    for score in scores.scores.values():
        finite(score, "the end of stage 1")
    progress.note(f"stage 1 ended after {result.num_steps} steps: {seen.why(result.stopped_by)}")
    if seen.num_forward:
        progress.note(f"measuring that took {seen.num_forward} forward passes over one example")
    record = {
        "losses": list(result.losses),
        "num_steps": result.num_steps,
        "num_trained_parameters": num_trained(model),
        "stopped_by": result.stopped_by,
        "stability": result.stability,
        "learning_rate": trainer.args.learning_rate,
        "seconds": result.seconds,
        "step_scores": dict(scores.scores),
    }
    if isinstance(model, PeftModel):
        return model, record | {"adapter_sha256": adapter_sha256(model)}
    return model, record | {"weights_sha256": weights_sha256(model)}
