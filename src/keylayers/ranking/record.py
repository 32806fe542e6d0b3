# SPDX-License-Identifier: Apache-2.0
"""What files say about how they were made, as types that are checked once. Needs no torch.

A file may hold more than is named here: the JSON itself (`Ranking.provenance`) is what is written
and hashed, and these types only read it. A section that is absent has its defaults, or is `None`
where its absence means something.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from keylayers.files import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT
from keylayers.model.options import UpdateOptions
from keylayers.validation import CountFromOne, CountFromZero, ListOf, Part, Text, read_part


class Environment(Part):
    """The software."""

    keylayers: Text | None = None
    commit: Text | None = None
    libraries: Mapping[Text, Text] = Field(default_factory=dict)


class Model(Part):
    """The base model."""

    name: Text | None = None
    weights_sha256: Text | None = None
    num_head_parameters: CountFromZero = 0


class Data(Part):
    """The data set and its split."""

    data: Text | None = None
    format: Text | None = None
    num_train: CountFromZero | None = None
    num_held_out: CountFromZero | None = None
    content_sha256: Text | None = None
    split_sha256: Text | None = None


class Options(Part):
    """All options of the run; those without an attribute are in `given`."""

    model_config = ConfigDict(extra="allow")

    objective: Text = "sft"  # files from before there was a choice do not name it
    update: Text | None = None
    lora_rank: CountFromOne = 16
    lora_alpha: CountFromOne = 32
    revision: Text | None = None
    adapter: Text | None = None
    tuned: Text | None = None
    seed: int | None = None
    mask_seed: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Every option that the file holds, by name."""
        return self.model_dump(exclude_unset=True)


class UpdateSource(Part):
    """An adapter or a tuned checkpoint that existed before."""

    name: Text | None = None
    weights_sha256: Text | None = None


class Measurement(Part):
    """The loss of a few examples after a step, and how much it improved in the window before."""

    step: CountFromOne
    loss_nats: float
    improvement_nats: float | None = None  # of the first there is none
    standard_error_nats: float | None = None  # None with a single example
    upper_nats: float | None = None  # upper 95 % bound of the improvement


class Stability(Part):
    """What was seen of the loss while a training waited for it to be stable."""

    num_measured: CountFromZero = 0  # examples; batches for KTO
    num_forward: CountFromZero = 0
    measurements: ListOf[Measurement] = ()

    def why(self, stopped_by: str) -> str:
        """Why a training ended, `stable` or `max_steps`, and what the last window showed."""
        ended = "the loss is stable" if stopped_by == "stable" else "the cap is reached"
        if len(self.measurements) < 2:
            return ended
        before, last = self.measurements[-2:]
        if last.improvement_nats is None or last.upper_nats is None:
            return ended
        if stopped_by != "stable":
            ended += " and the loss was not stable yet"
        did = "fell" if last.improvement_nats >= 0 else "rose"
        return (
            f"{ended}: in steps {before.step + 1} to {last.step} it {did} by "
            f"{abs(last.improvement_nats):.4f} on {self.num_measured} examples, and with 95 % "
            f"confidence it fell by less than {last.upper_nats:.4f}"
        )


class Stage1(Part):
    """The fine-tune of all modules."""

    num_steps: CountFromZero
    stopped_by: Text
    seconds: float
    losses: ListOf[float] = ()
    num_trained_parameters: CountFromZero = 0
    adapter_sha256: Text | None = None
    weights_sha256: Text | None = None
    stability: Stability = Stability()


class Extracted(Part):
    """An adapter that was made of the difference of two checkpoints."""

    tuned: Text
    lora_rank: CountFromOne
    share_of_energy: float


class InsideRun(Part):
    """A ranking that was made inside a training run."""

    at_step: CountFromZero
    num_steps: CountFromZero
    reason: Text
    stability: Stability = Stability()


class Mask(Part):
    """Stage 2, the scoring."""

    losses: ListOf[float]
    seconds: float
    score_unit: Text = ""
    num_forward: CountFromZero = 0
    num_backward: CountFromZero = 0
    loss_reduction_nats: float | None = None
    sum_of_scores_nats: float | None = None
    learning_rate: float | None = None  # of methods that learn the scores step by step


class HeldOutLoss(Part):
    """Held-out losses of the base model and of the whole fine-tune."""

    base: float
    tuned: float


class Imported(Part):
    """The file of another tool that the scores come from."""

    file: Text
    num_infinite: CountFromZero = 0
    num_left_out: CountFromZero = 0


class MadeBy(Part):
    """What made a ranking or a verification: all sections that are read anywhere."""

    environment: Environment = Environment()
    model: Model = Model()
    data: Data = Data()
    options: Options = Options()
    adapter: UpdateSource | None = None
    tuned: UpdateSource | None = None
    stage_1: Stage1 | None = None
    extracted: Extracted | None = None
    inside_run: InsideRun | None = None
    mask: Mask | None = None
    held_out_loss_nats: HeldOutLoss | None = None
    loss_unit: Text = "nats per token"
    adalora_ranks_left: Mapping[Text, int] = Field(default_factory=dict)
    imported: Imported | None = None
    trainer: Text = "trainer"

    @model_validator(mode="before")
    @classmethod
    def _is_json(cls, content: object) -> object:
        """All of it is written again in reports, also what is not named here; JSON has no NaN."""
        try:
            json.dumps(content, allow_nan=False)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"JSON with finite numbers only ({error})") from None
        return content

    @property
    def update_sha256s(self) -> set[str]:
        """Hashes that identify the update: of an adapter, or of a tuned checkpoint."""
        hashes = [update.weights_sha256 for update in (self.adapter, self.tuned) if update]
        if self.stage_1 is not None:
            hashes += [self.stage_1.adapter_sha256, self.stage_1.weights_sha256]
        return set(filter(None, hashes))

    def update_in(self, folder: Path | None) -> UpdateOptions:
        """The update that was ranked: the given one, or that of stage 1 in the ranking's folder."""
        given = UpdateOptions(adapter=self.options.adapter, tuned=self.options.tuned)
        if folder is None:
            return given
        if self.extracted is not None:
            return UpdateOptions(adapter=str(folder / STAGE_1_ADAPTER))
        is_full = self.options.update == "full"
        path = folder / (STAGE_1_CHECKPOINT if is_full else STAGE_1_ADAPTER)
        if self.stage_1 is None or not path.is_dir():
            return given
        return UpdateOptions(tuned=str(path)) if is_full else UpdateOptions(adapter=str(path))


class Selected(Part):
    """The selection that was trained or kept, as `Selection.record` writes it."""

    budget: Text
    modules: ListOf[Text]
    num_modules: CountFromZero
    num_candidates: CountFromZero
    num_parameters: CountFromZero
    num_candidate_parameters: CountFromZero
    lora_ranks: Mapping[Text, int] = Field(default_factory=dict)  # of rank-one parts


class TrainedSet(Part):
    """One trained set of modules; the first of a run is the base model."""

    label: Text
    num_modules: CountFromZero
    num_trained_parameters: CountFromZero
    held_out_loss_nats: float
    num_steps: CountFromZero


class Size(Part):
    """How large an update is."""

    num_modules: CountFromZero
    num_parameters: CountFromZero
    num_bytes: CountFromZero = 0  # on disk
    num_parts: CountFromZero | None = None  # rank-one parts, where these were cut


class Pruned(Part):
    """The update before and after it was pruned, with means over the held-out examples."""

    kind: Text = "adapter"  # or checkpoint
    modules: ListOf[Text] = ()
    full: Size
    pruned: Size
    base_loss_nats: float
    full_loss_nats: float
    pruned_loss_nats: float
    healed_loss_nats: float | None = None  # after the steps of training that followed
    num_held_out: CountFromZero = 0
    loss_unit: Text = "nats per token"


class RunRecord(MadeBy):
    """`keylayers.json`, which every adapter and checkpoint carries; `content` is all of it."""

    content: dict[str, Any]
    inputs_sha256: Text | None = None
    ranking_sha256: Text | None = None
    selection: Selected | None = None
    results: ListOf[TrainedSet] = ()
    result: Pruned | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_content(cls, content: Any) -> Any:
        return content | {"content": content} if isinstance(content, dict) else content


def read_run(path: Path) -> RunRecord:
    """The record of a training or pruning."""
    return read_part(RunRecord, path, "the record", "keylayers train")
