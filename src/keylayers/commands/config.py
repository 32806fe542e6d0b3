# SPDX-License-Identifier: Apache-2.0
"""Where options come from: flags, then the YAML file, then the record of a ranking."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Dict

from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError, did_you_mean
from keylayers.model.options import ModelOptions
from keylayers.training.options import TrainingOptions

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

# Options of a run that its ranking does not decide. A file from elsewhere must not be able to
# switch on `trust_remote_code`.
OF_THE_RUN = ("trust_remote_code", "dtype", "gradient_checkpointing", "report_to", "save_steps")
TAKEN_FROM_RANKING = tuple(
    option.name
    for part in (ModelOptions, DataOptions, TrainingOptions)
    for option in fields(part)
    if option.name not in OF_THE_RUN
)
ALSO_TAKEN = {  # `verify` and `prune` open the ranked update again
    "train": ("steps",),
    "verify": ("dtype", "adapter", "tuned"),
    "prune": ("dtype", "adapter", "tuned"),
}


def taken_from_ranking(command: str) -> tuple[str, ...]:
    """The options of a command that default to those of the ranking's own run."""
    return (*TAKEN_FROM_RANKING, *ALSO_TAKEN[command]) if command in ALSO_TAKEN else ()


def from_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill what no flag gives from the YAML file of `--config`."""
    path = _given(arguments, "config")
    if path is None:
        return
    from keylayers.yaml_values import read_yaml  # slow to import

    options = read_yaml(Path(path), "config")
    known = [name for argument in arguments if (name := _key(argument)) != "config"]
    normal = {key.replace("-", "_"): value for key, value in options.items()}
    for key in normal:
        if key not in known:
            raise ConfigError(
                f"every key in {path!r} must be an option of `keylayers {' '.join(commands)}`, got "
                f"{key!r}{did_you_mean(key, known)}"
            )
    _fill(app, arguments, normal, source=path)


def from_ranking_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """With `--ranking`, fill what is missing with the options of the ranking's own run."""
    wanted = taken_from_ranking(commands[0]) if commands else ()
    path = _given(arguments, "ranking") if wanted else None
    if path is None:
        return
    from keylayers.ranking.ranking import Ranking, ranking_file

    made_by = Ranking.load(path).made_by
    recorded = made_by.options.given
    options = {name: recorded.get(name) for name in wanted}
    if _given(arguments, "objective") not in (None, made_by.options.objective):
        options.pop("beta", None)  # it belongs to the objective
    if _given(arguments, "model") not in (None, recorded.get("model")):
        options.pop("revision", None)  # it belongs to the model
    if commands == ("train",):
        options["steps"] = None if made_by.stage_1 is None else made_by.stage_1.num_steps
    elif _given(arguments, "adapter") or _given(arguments, "tuned"):
        options |= {"adapter": None, "tuned": None}
    else:
        options |= asdict(made_by.update_in(ranking_file(path).parent))
    _fill(app, arguments, options, source=path)


def refuse_grpo(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Say that `--objective grpo` is for Python, because it needs rewards."""
    if _given(arguments, "objective") == "grpo":
        raise ConfigError(
            "`objective` must be sft, dpo, kto, orpo or reward on the command line, got grpo, "
            "whose rewards are a program; build TRL's GRPOTrainer and call keylayers.rank_modules"
        )


def _fill(app: App, arguments: ArgumentCollection, options: dict[str, Any], source: str) -> None:
    """Give each argument without tokens its value from `options`; None means not given."""
    values = {
        _flag(argument): options[_key(argument)]
        for argument in arguments
        if options.get(_key(argument)) is not None
    }
    Dict(values, source=source, use_commands_as_keys=False)(app, (), arguments)


def _given(arguments: ArgumentCollection, key: str) -> str | None:
    """The text that was given for an option, if any."""
    for argument in arguments:
        if _key(argument) == key and argument.tokens:
            return argument.tokens[0].value
    return None


def _flag(argument: Argument) -> str:
    return argument.name.lstrip("-")


def _key(argument: Argument) -> str:
    """An option's name in YAML files and records: `mask_steps` for `--mask-steps`."""
    return _flag(argument).replace("-", "_")


class FromRanking:
    """Shows in `--help` which options default to those of the ranking."""

    def __init__(self, command: str) -> None:
        """For the sub-command of this name."""
        self.flags = {"--" + name.replace("_", "-") for name in taken_from_ranking(command)}

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        """Print one panel of the help."""
        from cyclopts.help import DefaultFormatter

        entries = [
            entry.copy(required=False, default=_shown_default(entry.default))
            if self.flags.intersection(entry.positive_names)
            else entry
            for entry in panel.entries
        ]
        DefaultFormatter()(console, options, panel.copy(entries=entries))


def _shown_default(default: str | None) -> str:
    return "the ranking's" if default in (None, "None") else f"the ranking's, or {default}"
