# SPDX-License-Identifier: Apache-2.0
"""Where options come from: flags, then the YAML file, then the record of a ranking."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Group, Parameter
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.config import Dict

from keylayers.errors import ConfigError, did_you_mean
from keylayers.files import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

    from keylayers.ranking.record import MadeBy

# Titles of option groups in `--help`, in the order in which they are shown.
GROUPS = (
    "Selection",
    "Model",
    "Data",
    "An update that exists already",
    "Objective",
    "Fine-tuning",
    "When stage 1 ends",
    "Scoring",
    "Measuring",
    "Compared",
    "Benchmarks",
    "Gain and forgetting",
    "Running",
)

# Options that `train`, `verify` and `prune` take from the ranking's record if they are not given.
# Not `trust_remote_code`: a file from elsewhere must not be able to switch it on.
TAKEN_FROM_RANKING = (
    "model",
    "revision",
    "towers",
    "load_in_4bit",
    "data",
    "data_split",
    "format",
    "chat_template",
    "max_length",
    "max_examples",
    "held_out",
    "mask_data",
    "split_seed",
    "update",
    "objective",
    "beta",
    "learning_rate",
    "batch_size",
    "gradient_accumulation",
    "warmup_steps",
    "lora_rank",
    "lora_alpha",
    "seed",
)
ALSO_TAKEN = {  # `verify` and `prune` open the ranked update again
    "train": ("steps",),
    "verify": ("dtype", "adapter", "tuned"),
    "prune": ("dtype", "adapter", "tuned"),
}
FLAT = Parameter(name="*")  # shows the fields of an options class as flags of their own


def flat(title: str) -> Parameter:
    """Show the fields of an options class as flags of their own, together under `title`."""
    return Parameter(name="*", group=Group(title, sort_key=GROUPS.index(title)))


def flat_values(options: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The options of a command by the names of their flags, for the record.

    Args:
        options: An instance of the command's own options class.
        without: Names of fields to leave out.
    """
    from keylayers.commands.scoring_flags import ScoringFlags  # slow, for `keylayers --help`

    found: dict[str, Any] = {}
    for name, part in vars(options).items():
        if name not in without:
            found |= part.scoring().flat() if isinstance(part, ScoringFlags) else asdict(part)
    return found


def taken_from_ranking(command: str) -> tuple[str, ...]:
    """The options of a command that default to those of the ranking's own run."""
    also = ALSO_TAKEN.get(command)
    return () if also is None else (*TAKEN_FROM_RANKING, *also)


def from_config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill what no flag gives from the YAML file of `--config`.

    Raises:
        ConfigError: there is no such file, or it is not a mapping of this sub-command's options.
    """
    path = _given(arguments, "config")
    if path is None:
        return
    options = read_yaml(Path(path), "config")
    known = [name for argument in arguments if (name := _key(argument)) != "config"]
    normal = {str(key).replace("-", "_"): value for key, value in options.items()}
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
    from keylayers.ranking.ranking import Ranking

    made_by = Ranking.load(path).made_by
    recorded = made_by.options.given
    options = {name: recorded.get(name) for name in wanted}
    if _given(arguments, "objective") not in (None, made_by.options.objective):
        options.pop("beta", None)  # it belongs to the objective
    if _given(arguments, "model") not in (None, recorded.get("model")):
        options.pop("revision", None)  # it belongs to the model
    if commands == ("train",):
        options["steps"] = None if made_by.stage_1 is None else made_by.stage_1.num_steps
    else:
        options |= _update_of(Path(path), made_by, arguments)
    _fill(app, arguments, options, source=path)


def refuse_grpo(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise a ConfigError for `--objective grpo`, which is for Python: it needs rewards."""
    if _given(arguments, "objective") == "grpo":
        raise ConfigError(
            "`objective` must be sft, dpo, kto, orpo or reward on the command line, got grpo, "
            "whose rewards are a program; build TRL's GRPOTrainer and call keylayers.rank_modules"
        )


def _update_of(path: Path, made_by: "MadeBy", arguments: ArgumentCollection) -> dict[str, Any]:
    """The update that was ranked: the adapter or checkpoint of stage 1 next to the file."""
    if _given(arguments, "adapter") or _given(arguments, "tuned"):
        return {"adapter": None, "tuned": None}
    folder = path if path.is_dir() else path.parent
    option, name = "adapter", STAGE_1_ADAPTER
    if made_by.options.update == "full":
        option, name = "tuned", STAGE_1_CHECKPOINT
    is_there = made_by.stage_1 is not None and (folder / name).is_dir()
    return {option: str(folder / name)} if is_there else {}


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty for an empty file.

    Args:
        path: The file.
        name: The option that names the file, for error messages.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"`{name}` must be a YAML file, but {str(path)!r} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(path)!r} must be valid YAML, but is not: {reason}") from error
    from keylayers.yaml_values import yaml_value  # slow to import

    options = yaml_value(text, repr(str(path)))
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{str(path)!r} must map options to values, got a {type(options).__name__}"
        )
    for key in options:
        if not isinstance(key, str):
            raise ConfigError(f"every key in {str(path)!r} must be a name, got {key!r}")
    return options


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


def flag_words(name: str, value: Any) -> list[str]:
    """An option in the words of a command line."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(str(part).startswith("-") for part in parts):  # or it could pass for another flag
        return [f"{flag}={part}" for part in parts]
    return [flag, *map(str, parts)] if parts else []


def _shown_default(default: str | None) -> str:
    return "the ranking's" if default in (None, "None") else f"the ranking's, or {default}"
