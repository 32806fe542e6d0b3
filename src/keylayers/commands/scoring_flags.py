# SPDX-License-Identifier: Apache-2.0
"""The flags of all methods side by side, generated from the table of methods. Needs no torch."""

from dataclasses import asdict, dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from docstring_parser import parse

from keylayers.errors import ConfigError
from keylayers.options import Options
from keylayers.scores.methods import DEFAULT_FOR, methods
from keylayers.scores.scoring_options import ScoringOptions, all_options, scoring_from_flat

Purpose = Literal["prune", "retrain"]
HELP = {
    "for_": "What the ranking is for, which chooses the method: prune (what the updates of this "
    "fine-tune are worth), or retrain (which modules to train from the start). Default: prune.",
    "method": "How modules are scored. elimination (to prune): each update's share of the loss "
    "reduction in nats, in rounds that keep fewer and fewer modules. gradient-path (to retrain): "
    "how strongly the loss of the base model pulls at a weight, and what its update adds. ila: "
    "learned gates, as published. docs/methods.md has all methods.",
    "mask_seed": "Seed of the order of the batches that modules are scored on. Default: the "
    "training's seed.",
}


@dataclass(frozen=True, kw_only=True)
class _Flags(Options):
    """What a type checker knows of the generated class."""

    for_: Purpose | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scoring()  # refuses options of other methods

    def scoring(self) -> ScoringOptions:
        """The method and its options."""
        if self.for_ is not None and self.method is not None:
            raise ConfigError(
                f"`for` must be left out with `method`, which decides, got {self.for_} and "
                f"{self.method}"
            )
        method = self.method or DEFAULT_FOR[self.for_ or "prune"]
        return scoring_from_flat(asdict(self) | {"method": method})


def option_help(name: str) -> str:
    """What an option does and which methods it is for."""
    if name in HELP:
        return HELP[name]
    owners = [method for method in methods().values() if name in method.option_names]
    for part in owners[0].options.__mro__:
        for parameter in parse(part.__doc__ or "").params:
            if parameter.arg_name == name:
                text = " ".join((parameter.description or "").split())
                return f"{text} For {', '.join(method.name for method in owners)}."
    return f"For {', '.join(method.name for method in owners)}."


def _flags_class() -> type:
    """A frozen dataclass of all options, whose docstring cyclopts shows as help."""
    choices = Literal[tuple(methods())]  # type: ignore[valid-type]
    options: dict[str, Any] = {"for_": (Purpose | None, None), "method": (choices | None, None)}
    options |= {name: (option.type, option.default) for name, option in all_options().items()}
    options["mask_seed"] = (int | None, None)
    lines = "\n".join(f"    {name}: {option_help(name)}" for name in options)
    made = make_dataclass(
        "ScoringFlags",
        [(name, kind, field(default=default)) for name, (kind, default) in options.items()],
        bases=(_Flags,),
        frozen=True,
        kw_only=True,
    )
    made.__module__ = __name__  # cyclopts takes classes of `types` for builtins
    made.__doc__ = f"How the modules are scored.\n\nAttributes:\n{lines}\n"
    return made


if TYPE_CHECKING:
    ScoringFlags = _Flags
else:
    ScoringFlags = _flags_class()
