# SPDX-License-Identifier: Apache-2.0
"""The command line. Each sub-command is a file that is loaded when it is called.

Exit code 0 for success, 2 for a user's mistake (one line on stderr, nothing left behind), 1 for a
failure of keylayers itself, 130 after Ctrl-C. `--traceback` shows where an error came from.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

from keylayers._version import __version__
from keylayers.commands.config import from_config_file, from_ranking_file, refuse_grpo
from keylayers.environment import check_no_password
from keylayers.errors import ConfigError, KeylayersError, OutputError
from keylayers.files import FULL, WHAT_TO_DO

app = App(
    name="keylayers",
    help="Find the weight matrices that a fine-tune of a language model really needs, and train "
    "only those.",
    version=__version__,
    config=(from_config_file, from_ranking_file, refuse_grpo),
    help_format="plaintext",  # what renders the markdown of sub-commands is slow to import
    suppress_keyboard_interrupt=False,  # `main` handles it
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
)
# Repeats the first lines of the sub-commands' help, so that `keylayers --help` loads none of them.
COMMANDS = {
    "demo": "Rank, verify and train on the built-in model: no network, about two minutes.",
    "rank": "Rank the modules of a model for a fine-tune.",
    "show": "Show a ranking: heatmap of blocks by projections, best and worst modules, provenance.",
    "verify": "Measure a ranking: held-out loss with only the best modules' updates kept.",
    "compare": "Show how far rankings pick the same modules, compared with chance.",
    "train": "Train only the modules that a ranking and a budget select.",
    "prune": "Cut an adapter, or a tuned checkpoint, to the modules that a ranking and a budget "
    "select.",
    "extract": "Make a small LoRA adapter of the difference of two checkpoints.",
    "eval": "Compare a model with adapters and checkpoints: benchmarks and losses in one table.",
    "import": "Make a ranking of a scan by Spectrum: it can be shown, compared, trained on and "
    "exported.",
    "study": "Run every combination of models, data, seeds, methods and budgets, each once.",
    "targets": "Show which modules a training config trains, without loading weights.",
    "export": "Write the files with which a tool trains or merges exactly the selected modules.",
}
for _name, _help in COMMANDS.items():
    _file = {"import": "import_"}.get(_name, _name)
    app.command(f"keylayers.commands.{_file}:app", name=_name, help=_help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, with the process's own arguments by default; returns the exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    is_traceback_wanted = "--traceback" in tokens
    tokens = [token for token in tokens if token != "--traceback"]
    _quiet_libraries()
    try:
        for token in tokens:
            check_no_password(token, "an option")
        app(tokens, print_error=False, exit_on_error=False, result_action="return_value")
    except KeyboardInterrupt:
        _complain("stopped; nothing is half written, and the same command continues from there")
        return 130
    except BrokenPipeError:  # the reader of our output (`head`) closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CycloptsError, KeylayersError, OSError) as error:
        known = None if is_traceback_wanted else _known(error)
        if known is None:
            raise
        _complain(str(known))
        return known.exit_code
    return 0


def run() -> None:
    """The console script: `main` with the process's arguments, as its exit code."""
    sys.exit(main())


def _known(error: CycloptsError | KeylayersError | OSError) -> KeylayersError | None:
    """The error as one of ours; None for a failure that is nobody's mistake."""
    if isinstance(error, KeylayersError):
        return error
    if isinstance(error, CycloptsError):
        # cyclopts 4 names a whole group of options if none of them is given: name the one missing
        while error.argument is not None and error.argument.children:
            error.argument = next(part for part in error.argument.children if part.required)
        return ConfigError(str(error))
    if error.errno == errno.ENAMETOOLONG:
        return OutputError(
            f"a file or a folder must have a name that the system takes, but one that begins with "
            f"{str(error.filename)[:40]!r} is too long"
        )
    if error.errno in FULL:
        return OutputError(f"the disk must have room for what libraries keep on it, {WHAT_TO_DO}")
    return None


def _quiet_libraries() -> None:
    """Stop libraries from printing and from reporting to servers; call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own bars
    # bitsandbytes 0.50 advises to install `kernels` when it is imported, also without 4-bit layers
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for library in ("peft", "transformers", "trl"):  # deprecations between them, not for users
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)


def _complain(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # the first process of the machine says it
    sys.stderr.write(f"keylayers: {' '.join(text.split())}\n")
