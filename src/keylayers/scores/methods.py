# SPDX-License-Identifier: Apache-2.0
"""The table of scoring methods: everything that the rest of keylayers knows of them.

The command line's choices, flags and help, the refusals, the steps of a progress bar and the table
in docs/methods.md all come from here. Other packages add methods with `register_method`, or with an
entry point in the group `keylayers.methods`; docs/add-a-method.md shows how. Needs no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Literal

from keylayers.errors import ConfigError, did_you_mean
from keylayers.scores.options import (
    AdaLoraOptions,
    Batched,
    EliminationOptions,
    GradientPathOptions,
    GroupedBatches,
    IlaOptions,
    LearnedOptions,
    MethodOptions,
    PathOptions,
    PriceOptions,
    ShapleyOptions,
)

DEFAULT_METHOD = "elimination"
DEFAULT_FOR = {"prune": DEFAULT_METHOD, "retrain": "gradient-path"}
RESERVED = ("for_", "method", "mask_seed")  # options of every method

# What a method looks at. A trainer that samples its data (GRPO) has a gradient, but its losses at
# two masks cannot be compared and its batches hold no tokens.
Needs = Literal["nothing", "gradient", "activations", "loss", "examples"]


@dataclass(frozen=True)
class Method:
    """One scoring method.

    Attributes:
        name: Value of `--method`.
        title: What a score is, in a few words.
        function: `package.module:function`, imported when the method is used; or the function
            itself. It is called with a `scores.task.Task` and the method's options and returns
            `ModuleScores`.
        options: Frozen dataclass of the method's own options, each with a default.
        num_steps: Steps that the method reports, from its options and the number of gates. None if
            there are none, or if their number is not known beforehand.
        needs: What the method looks at; only `nothing` and `gradient` work with a trainer that
            samples its data, and `examples` (the gradient of single ones) not with every update.
        source: Where the method was published.
    """

    name: str
    title: str
    function: str | Callable[..., Any]
    options: type = MethodOptions
    num_steps: Callable[[Any, int], int | None] | None = None
    needs: Needs = "loss"
    source: str = ""

    @property
    def option_names(self) -> tuple[str, ...]:
        """The names of the method's own options."""
        return tuple(option.name for option in fields(self.options))

    def load(self) -> Callable[..., Any]:
        """The function that scores."""
        if isinstance(self.function, str):
            function: Callable[..., Any] = resolve_name(self.function)
            return function
        return self.function


def _method(name: str, title: str, *more: Any, where: str = "", **options: Any) -> Method:
    """A method whose function has its name, in a file of this name, unless it is elsewhere."""
    own = name.replace("-", "_")
    return Method(name, title, f"keylayers.scores.{where or f'{own}:{own}'}", *more, **options)


def _batches(options: Batched, num_gates: int) -> int:
    return options.mask_batches


def _steps(options: LearnedOptions | AdaLoraOptions, num_gates: int) -> int:
    return options.mask_steps


def _rounds(options: EliminationOptions, num_gates: int) -> int:
    return options.mask_batches * len(options.round_sizes(num_gates))


# fmt: off
BUILT_IN = (
    _method("elimination", "path-integrated gate gradients under a budget that shrinks in rounds",
            EliminationOptions, _rounds, "gradient", "keylayers; Guyon et al. 2002"),
    _method("path", "what each update adds to the loss reduction of the fine-tune", PathOptions,
            lambda options, num_gates: options.mask_batches * (options.path_points + 2),
            "gradient", "Sundararajan et al. 2017, arXiv:1703.01365"),
    _method("price", "learned gates that must be worth their price", PriceOptions, _steps,
            "gradient", "keylayers; Shi et al. 2025, arXiv:2410.17875"),
    _method("fisher-pruning", "what closing each gate costs, to second order, in rounds",
            EliminationOptions, _rounds, "examples", "Theis et al. 2018, arXiv:1801.05787"),
    _method("ila", "the gates that gradient descent learns on what a fine-tune added",
            IlaOptions, _steps, "gradient", "Shi et al. 2025, arXiv:2410.17875"),
    _method("leave-one-out", "how much the loss rises when one update is removed", GroupedBatches,
            lambda options, num_gates: options.mask_batches * (num_gates + 1),
            source="Mozer, Smolensky 1988"),
    _method("shapley", "the mean gain of a module over random orders of adding it",
            ShapleyOptions, lambda options, num_gates: options.permutations * (num_gates + 1),
            source="Castro et al. 2009"),
    _method("update-norm", "how far the fine-tune moved a weight", needs="nothing",
            source="Han et al. 2015, arXiv:1506.02626"),
    _method("gradient-norm", "how strongly the loss of the base model pulls at a weight",
            Batched, _batches, "gradient", "Saket 2026, arXiv:2604.15351"),
    _method("gradient-path", "how strongly the base model's loss pulls at a weight, and what its "
            "update adds", GradientPathOptions,
            lambda options, num_gates: options.mask_batches * (options.path_points + 1),
            "gradient", "keylayers"),
    _method("fisher", "how much information the data hold about a weight of the base model",
            Batched, _batches, "gradient", "Sung et al. 2021, arXiv:2111.09839"),
    _method("aletheia", "gradient norm by block", Batched, _batches, "gradient",
            "Saket 2026, arXiv:2604.15351", where="gradient_norm:aletheia"),
    _method("adalora", "the LoRA rank that AdaLoRA's own training leaves a module",
            AdaLoraOptions, _steps, source="Zhang et al. 2023, arXiv:2303.10512"),
    _method("lora-drop", "how large the output of each update is on the data",
            Batched, _batches, "activations", "Zhou et al. 2025, arXiv:2402.07721"),
    _method("eva", "the LoRA rank that a module earns by the variance of its inputs",
            Batched, needs="activations", source="Paischer et al. 2025, arXiv:2410.07170"),
    _method("plop", "how little a weight's features are aligned with its inputs",
            Batched, _batches, "activations", "Hayou et al. 2025, arXiv:2506.20629"),
    _method("spectrum", "signal-to-noise ratio of the base model's weights, within each projection",
            needs="nothing", source="Hartford et al. 2024, arXiv:2406.06623"),
    _method("kappatune", "low condition number of the base model's weights",
            needs="nothing", source="PEFT's KappaTune"),
    _method("block-influence", "how much a block of the base model turns the hidden state",
            Batched, _batches, "activations", "Men et al. 2024, arXiv:2403.03853"),
    _method("cka", "how much a block of the base model changes the geometry of a set of examples",
            Batched, _batches, "activations", "Ando Ogawa et al. 2026, arXiv:2602.05988"),
    _method("first", "the first blocks", where="controls:first", needs="nothing"),
    _method("last", "the last blocks", where="controls:last", needs="nothing"),
    _method("middle", "the middle blocks", where="controls:middle", needs="nothing"),
    _method("random", "a random number: the control for every method",
            where="controls:random_order", needs="nothing"),
)
# fmt: on
_METHODS = {method.name: method for method in BUILT_IN}


def methods() -> Mapping[str, Method]:
    """All methods by name: the built-in ones, then those of other packages."""
    _load_entry_points()
    return _METHODS


def find_method(name: str) -> Method:
    """The method of that name, or a ConfigError that lists all names."""
    known = methods()
    if name not in known:
        raise ConfigError(
            f"`method` must be one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
        )
    return known[name]


def register_method(method: Method) -> None:
    """Add a scoring method to those that `rank_modules` and `FreezeUnimportant` know.

    For the command line, declare the method as an entry point in the group `keylayers.methods`.

    Raises:
        ConfigError: its name is taken, or an option is unlike another method's of the same name.
    """
    _load_entry_points()
    _add(method)


@cache
def _load_entry_points() -> None:
    found = []
    for entry in sorted(entry_points(group="keylayers.methods"), key=lambda entry: entry.name):
        try:
            method = entry.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the method {entry.name} cannot be loaded from {entry.value}: {error}; repair or "
                f"uninstall its package"
            ) from error
        if not isinstance(method, Method):
            raise ConfigError(
                f"the entry point {entry.value} must be a keylayers.Method, got {method!r}"
            )
        found.append(method)
    for method in found:
        _add(method)


def _add(method: Method) -> None:
    """Put a method into the table, unless its name or an option of it collides with another's."""
    if method.name in _METHODS:
        taken = _METHODS[method.name].function
        where = taken if isinstance(taken, str) else f"{taken.__module__}:{taken.__name__}"
        raise ConfigError(
            f"a method must have a name of its own, but {method.name!r} is that of {where}; choose "
            f"another, or declare it once: by an entry point or by `register_method`"
        )
    if not (isinstance(method.options, type) and is_dataclass(method.options)):
        raise ConfigError(
            f"`options` of method {method.name} must be a dataclass, got {method.options!r}"
        )
    owners = {option.name: other for other in _METHODS.values() for option in fields(other.options)}
    for option in fields(method.options):
        if option.default is MISSING or option.name in RESERVED:
            raise ConfigError(
                f"every option of method {method.name} must have a default and another name than "
                f"{' and '.join(RESERVED)}, got `{option.name}`"
            )
        owner = owners.get(option.name, method)
        (theirs,) = (other for other in fields(owner.options) if other.name == option.name)
        if (theirs.type, theirs.default) != (option.type, option.default):
            raise ConfigError(  # one flag serves all methods that have the option
                f"`{option.name}` of method {method.name} must have type and default of "
                f"{owner.name}'s option, or another name; got {option.type}, default "
                f"{option.default!r}"
            )
    _METHODS[method.name] = method
