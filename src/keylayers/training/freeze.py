# SPDX-License-Identifier: Apache-2.0
"""The paper's algorithm inside a run: score when the loss is stable, freeze, continue.

The callback keeps its findings in the trainer's state, which is part of each checkpoint, so that a
resumed run gives the same result as a run that was never stopped.
"""

import json
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from keylayers.errors import ConfigError
from keylayers.model.preserve import kept_frozen
from keylayers.model.sharding import check_can_freeze_inside
from keylayers.options import check_fraction
from keylayers.progress import Progress
from keylayers.ranking.budget import Freeze
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.record import Stability
from keylayers.ranking.selection import Selection, check_same_modules
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.trainers.data import samples
from keylayers.training.halt import HaltedUpdates, check_can_halt, halt_updates
from keylayers.training.options import FreezeAction, StabilityOptions
from keylayers.training.rank_modules import rank_modules
from keylayers.training.stability import LossHistory, StabilityWatch
from keylayers.updates import adapter_updates

# Key of the findings in the trainer's state. `ExportableState` would not do: from it transformers
# 5.23 would build a new callback and drop the user's, with its `mask_dataset`.
STATE_KEY = "keylayers.FreezeUnimportant"


class FreezeUnimportant(TrainerCallback):
    """Freezes the least important modules of a LoRA fine-tune while it runs.

    For any transformers or TRL trainer whose model carries a LoRA adapter, in one process or
    under DDP or FSDP2. Until the freeze the run is bit for bit what it would have been without the
    callback.

    Attributes:
        ranking: The ranking; None before the freeze.
        frozen_at_step: The last step that trained all modules; None before the freeze.
        reason: `stable` or `max_steps`; None before the freeze.
        stability: What was measured of the loss until then, as a record holds it.
    """

    def __init__(
        self,
        freeze_fraction: float = 0.25,
        *,
        action: FreezeAction = "freeze",
        window: int = StabilityOptions.window,
        epsilon: float = StabilityOptions.epsilon,
        max_steps: int | None = None,
        method: str | ScoringOptions = "elimination",
        mask_dataset: Dataset | None = None,
        mask_seed: int | None = None,
        trainer: Trainer | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        """Check the options; nothing else happens before training begins.

        Args:
            freeze_fraction: Share of the modules to freeze; the paper freezes a quarter.
            action: `freeze` keeps what these modules have learned, `remove` sets it to zero.
            window: Steps between two measurements of the loss on the same 32 examples of the
                `mask_dataset`, which start after the warm-up.
            epsilon: The loss is stable when it surely (95 %) fell by less than this many nats in
                the last window, or rose. 0: rank at `max_steps`.
            max_steps: The modules are ranked after this step in any case. Default: half of the
                run's steps.
            method: Name of the scoring method (docs/methods.md).
            mask_dataset: Examples to score on, in the form of the trainer's `train_dataset`,
                preferably not trained on. Default: the `train_dataset` itself.
            mask_seed: Seed of the order of the mask's batches. Default: the trainer's seed.
            trainer: Needed only if the callback cannot find it, for example in a wrapped trainer.
            progress: Gets notes about what was done.
            **options: Options of the method, for example `mask_batches=8`.

        Raises:
            ConfigError: an option has a value that cannot be used.
        """
        check_fraction("freeze_fraction", freeze_fraction)
        if action not in get_args(FreezeAction):
            raise ConfigError(f"`action` must be freeze or remove, got {action!r}")
        self.freeze_fraction = freeze_fraction
        self.action = action
        self.stability_rule = StabilityOptions(max_steps=max_steps, window=window, epsilon=epsilon)
        self.scoring = scoring_options(method, mask_seed=mask_seed, **options)
        if self.scoring.granularity == "part":
            raise ConfigError(
                "`granularity` must be module, block or projection where modules are frozen, got "
                "part; rank parts with `keylayers rank`"
            )
        self.mask_dataset = mask_dataset
        self.progress = progress or Progress()
        self.ranking: Ranking | None = None
        self.frozen_at_step: int | None = None
        self.reason: str | None = None
        self._given_trainer = trainer
        self._replaced = ExitStack()  # gives trainer and model back what was replaced
        self._history = LossHistory(self.stability_rule)
        self._watch: StabilityWatch | None = None  # until the freeze
        self._halted: HaltedUpdates | None = None
        self._first_step_after = 0

    @property
    def selection(self) -> Selection | None:
        """The modules that are still trained; None before the freeze."""
        return None if self.ranking is None else self.ranking.select(Freeze(self.freeze_fraction))

    @property
    def stability(self) -> dict[str, Any]:
        """What was measured of the loss until the freeze, as a record holds it."""
        return self._history.record()

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen modules, in model order; empty before the freeze."""
        if self.ranking is None or self.selection is None:
            return ()
        kept = set(self.selection.names)
        return tuple(module.name for module in self.ranking.modules if module.name not in kept)

    def decisive(self) -> dict[str, Any]:
        """The options that decide what is found and frozen, for a hash of a run's inputs."""
        return {
            "freeze_fraction": self.freeze_fraction,
            "action": self.action,
            "stability": asdict(self.stability_rule),
            "mask": self.scoring.flat(),
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Refuse what cannot work; a resumed run takes over the findings of its checkpoint."""
        self._let_go()  # the last run may have ended with an error
        trainer = self._given_trainer or trainer_of(self)
        self._check(trainer, state)
        self.ranking = self.frozen_at_step = self.reason = None
        self._watch = StabilityWatch(trainer, self.stability_rule, self.mask_dataset)
        self._history = self._watch.history
        if samples(trainer) and self.stability_rule.epsilon > 0:
            self.progress.note(
                "the loss of sampled completions is near zero whatever the model, so its stability "
                "is not measured: modules are ranked at `max_steps`"
            )
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            self._take_over(trainer, saved, state)
        self._remember(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Rank and freeze when it is time; between two steps there are no gradients to disturb."""
        if self._halted is not None and state.global_step == self._first_step_after:
            self._halted.check()  # catches an optimiser that moves weights without gradients
        if self._watch is None:
            return
        if state.global_step < state.max_steps:
            if self._watch.see(state.global_step):
                self.reason = "stable"
            elif state.global_step >= self.stability_rule.cap_within(state.max_steps):
                self.reason = "max_steps"
        if self.reason is not None:
            self._rank_and_freeze(state)
        self._remember(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Write the ranking into the checkpoint for `keylayers show`; resuming ignores it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.ranking is not None and state.is_world_process_zero and folder.is_dir():
            self.ranking.save(folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kw: Any
    ) -> None:
        """Prove that frozen modules did not change; warn if nothing was frozen."""
        halted = self._halted
        self._let_go()
        if halted is None:
            what = f"nothing was frozen: training ended at step {state.global_step}"
            warnings.warn(f"{what} before the loss was stable or `max_steps` reached", stacklevel=2)
            return
        for parameter in halted.parameters.values():
            parameter.requires_grad_(False)  # loading the best checkpoint sets the flags
        best = state.best_global_step if args.load_best_model_at_end else None
        if best is None or best >= (self.frozen_at_step or 0):
            halted.check()

    def _check(self, trainer: Trainer, state: TrainerState) -> None:
        callbacks = trainer.callback_handler.callbacks
        count = sum(isinstance(callback, type(self)) for callback in callbacks)
        if count > 1:
            raise ConfigError(f"a trainer must hold one {type(self).__name__} at most, got {count}")
        check_can_freeze_inside(trainer)
        check_can_halt(trainer.model, self.action)
        num_modules = len(adapter_updates(trainer.model))
        if Freeze(self.freeze_fraction).num_of(num_modules, "modules") == num_modules:
            raise ConfigError(
                f"`freeze_fraction` must be at least one of the adapter's {num_modules} modules, "
                f"got {self.freeze_fraction}, which freezes none"
            )
        self.stability_rule.cap_within(state.max_steps)

    def _rank_and_freeze(self, state: TrainerState) -> None:
        trainer = self._given_trainer or trainer_of(self)
        assert self.reason is not None
        why = Stability.model_validate(self.stability).why(self.reason)
        self.progress.note(f"step {state.global_step}: {why}; ranking by {self.scoring.method}")
        self.ranking = rank_modules(trainer, self.scoring, mask_dataset=self.mask_dataset)
        self.frozen_at_step = state.global_step
        self._freeze(trainer, state)
        done = "frozen"
        if self.action == "remove":
            # An earlier checkpoint must not come back as the best: it holds what was removed.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            done = "set to zero and frozen"
        self.progress.note(
            f"step {state.global_step}: {len(self.frozen)} of {len(self.ranking.modules)} modules "
            f"are {done}"
        )

    def _take_over(self, trainer: Trainer, saved: dict[str, Any], state: TrainerState) -> None:
        """Continue where the run that wrote the checkpoint stopped."""
        self._history.restore(saved["stability"])
        if saved["ranking"] is None:
            return
        for name in ("freeze_fraction", "action"):
            if saved[name] != getattr(self, name):
                raise ConfigError(
                    f"`{name}` must be {saved[name]} as in the checkpoint, which has frozen "
                    f"modules already, got {getattr(self, name)}; start from an earlier one"
                )
        self.ranking = Ranking.from_json(json.loads(saved["ranking"]), "the checkpoint's state")
        self.frozen_at_step, self.reason = saved["frozen_at_step"], saved["reason"]
        modules = [update.module for update in adapter_updates(trainer.model)]
        check_same_modules(self.ranking.modules, {m.name: m.num_parameters for m in modules})
        self._freeze(trainer, state)
        self.progress.note(
            f"{len(self.frozen)} of {len(modules)} modules stay frozen as in the checkpoint"
        )

    def _freeze(self, trainer: Trainer, state: TrainerState) -> None:
        self._let_go()
        self._first_step_after = state.global_step + 1
        self._halted = halt_updates(trainer.model, self.frozen, self.action, trainer.optimizer)
        # Trainers that switch adapters in their loss would unfreeze them.
        self._replaced.enter_context(kept_frozen(trainer.model))

    def _let_go(self) -> None:
        self._replaced.close()
        self._watch = self._halted = None

    def _remember(self, state: TrainerState) -> None:
        state.stateful_callbacks[STATE_KEY] = {
            "freeze_fraction": self.freeze_fraction,
            "action": self.action,
            "stability": self._history.state(),
            "frozen_at_step": self.frozen_at_step,
            "reason": self.reason,
            # as text, because the trainer sorts the keys of what it saves
            "ranking": None if self.ranking is None else json.dumps(self.ranking.to_json()),
        }


def trainer_of(callback: TrainerCallback) -> Trainer:
    """The trainer that is calling `callback` right now; its own methods do, so the stack has it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise ConfigError(
        f"{type(callback).__name__} must be called by the trainer that holds it, but none is on "
        f"the call stack; give it as `trainer`"
    )
