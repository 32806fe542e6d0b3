# SPDX-License-Identifier: Apache-2.0
"""`keylayers extract`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from keylayers.commands import sub_command
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import (
    FLAT,
    CutOptions,
    Data,
    Model,
    Objective,
    PruneOptions,
    RankOptions,
    flat,
)
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.errors import ConfigError
from keylayers.files import STAGE_1_ADAPTER
from keylayers.model.options import UpdateOptions
from keylayers.options import Options
from keylayers.ranking.budget import Auto, Time, parse_budget
from keylayers.training.options import ObjectiveOptions, TrainingOptions

app = sub_command("""\
keylayers extract --model base --tuned instruct --data chats.jsonl --max-loss 0.01
keylayers extract --model base --tuned instruct --data chats.jsonl --lora-rank 64 --budget 64MiB
""")


@dataclass(frozen=True, kw_only=True)
class SizeOptions(Options):
    """What is extracted, and how small it becomes.

    Attributes:
        tuned: Checkpoint that was fine-tuned from the model, folder or name on the hub.
        lora_rank: Rank in every module before parts are left out; with that rank and no data the
            adapter is what a plain truncated SVD gives.
        budget: How much is kept, such as 0.1x-params of the parameters, or 64MiB on disk.
        max_loss: Instead of a budget: keep the fewest parts whose held-out loss is with 95 %
            confidence at most this much above that of all of them, in nats.
        pad_ranks: Every rank is a multiple of this, for engines that need it.
        batch_size: Examples per batch while parts are ranked.
        mask_batches: Batches in each round of the ranking.
    """

    tuned: str
    lora_rank: int = 64
    budget: str | None = None
    max_loss: float | None = None
    pad_ranks: int = 1
    batch_size: int = 4
    mask_batches: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_one_given(budget="such as 64MiB", max_loss="such as 0.01")
        if self.budget is not None and isinstance(parse_budget(self.budget), (Auto, Time)):
            raise ConfigError(
                f"`budget` must be of parts, such as 0.1x-params or 64MiB, got {self.budget}"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """All options of an extraction."""

    size: Annotated[SizeOptions, flat("Extraction")]
    model: Model
    data: Data
    objective: Objective = ObjectiveOptions()

    def ranking(self) -> RankOptions:
        """How the parts are ranked; gates of experts have no gradient of single examples."""
        from keylayers.model.loading import empty_model
        from keylayers.model.modules import map_modules

        size, model = self.size, empty_model(self.model, self.objective.objective)
        has_experts = any(info.is_stacked for info in map_modules(model, self.model.towers))
        of_method: dict[str, Any] = {"granularity": "part", "mask_batches": size.mask_batches}
        return RankOptions(
            model=self.model,
            data=self.data,
            update=UpdateOptions(tuned=size.tuned),
            training=TrainingOptions(
                **vars(self.objective), lora_rank=size.lora_rank, batch_size=size.batch_size
            ),
            scoring=ScoringFlags(
                method="elimination" if has_experts else "fisher-pruning", **of_method
            ),
        )

    def pruning(self, output: Path) -> PruneOptions:
        """How the adapter of all parts, which is in `output`, is cut."""
        size = {name: getattr(self.size, name) for name in ("budget", "max_loss", "pad_ranks")}
        return PruneOptions(
            selection=CutOptions(ranking=str(output), **size),
            model=self.model,
            data=self.data,
            update=UpdateOptions(adapter=str(output / STAGE_1_ADAPTER)),
            objective=self.objective,
        )


@app.default
def extract(
    *,
    options: Annotated[ExtractOptions, FLAT],
    output: Path = Path("extracted"),
    config: Path | None = None,
) -> None:
    """Make a small LoRA adapter of the difference of two checkpoints.

    Decomposes the difference of every module, ranks the rank-one parts of all modules by the loss
    (with fisher-pruning; mixtures of experts with elimination), and keeps the best: which modules,
    and which rank each. Writes the adapter of all parts (`adapter`), their ranking, which
    `keylayers prune` cuts again at other sizes, and the small adapter (`pruned`).

    Args:
        output: Folder of the three.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_prune import run_prune
    from keylayers.commands.run_rank import run_rank
    from keylayers.report.terminal import pruning_report

    pruning, progress = options.pruning(output), ConsoleProgress()  # checked before any work
    run_rank(options.ranking(), output, progress, output)
    found = run_prune(pruning, output / "pruned", progress)
    print_result(pruning_report(found), f"{found.kind} written to {output / 'pruned'}")
