# SPDX-License-Identifier: Apache-2.0
"""The house as docs/architecture.md draws it: public names, direction of imports, lightness."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "keylayers"

# From the lowest layer to the highest: a file imports from its own layer or a lower one.
LAYERS = (
    (
        "_version",
        "errors",
        "ranges",
        "environment",
        "files",
        "validation",
        "yaml_values",
        "processes",
        "progress",
    ),
    ("model", "updates", "trainers"),
    ("gates", "scores"),
    ("ranking",),
    ("data", "training", "evaluation", "apply", "export", "report", "demo"),
    ("commands", "cli", "__main__"),
)
LAYER = {name: index for index, names in enumerate(LAYERS) for name in names}


FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def graph_of_imports():
    """File -> files of keylayers that it imports, at its top or in a function."""
    known = {name_of(path): path for path in FILES}
    graph = {}
    for path in FILES:
        graph[path] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                full = (f"{node.module}.{alias.name}" for alias in node.names)
                names = {name if name in known else node.module for name in full}
                graph[path] |= {known[name] for name in names if name in known}
    return graph


def name_of(path):
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(path):
    return LAYER[path.relative_to(SOURCE).parts[0].removesuffix(".py")]


def test_imports_point_one_way():
    upwards = [
        f"{path.relative_to(SOURCE)} imports {other.relative_to(SOURCE)}"
        for path, others in graph_of_imports().items()
        for other in others
        if layer_of(other) > layer_of(path)
    ]
    assert upwards == []


def test_no_files_import_each_other_in_a_circle():
    with pytest.raises(CycleError, match="nodes are in a cycle"):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"b"}}).prepare()
    TopologicalSorter(graph_of_imports()).prepare()  # the error names the files


def test_every_file_has_its_place():
    tops = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES}
    assert tops == set(LAYER)


PUBLIC = """FreezeUnimportant KeylayersError Method Ranking Selection ShallowBackward StepScores
__version__ agreement consensus export_selection mask_curve measured_memory module_weights
rank_modules register_method"""


def test_the_public_names_are_exact():
    import keylayers

    assert keylayers.__all__ == PUBLIC.split()
    for name in keylayers.__all__:
        assert getattr(keylayers, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = keylayers.nothing


def test_no_public_function_has_the_name_of_a_file():
    """Or it would be a module for whoever asks after that file was imported."""
    import keylayers

    assert not set(keylayers.__all__) & set(LAYER)


HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


def first_heavy(codes):
    """The first of these lines that loads a heavy library, in a fresh process."""
    script = f"""
import sys
sys.path.insert(0, {str(SOURCE.parent)!r})
for code in {codes!r}:
    exec(code)
    if any(name in sys.modules for name in {HEAVY}):
        sys.exit(code)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[-1] if done.returncode else None


LIGHT = [
    "import keylayers",
    "from keylayers.cli import main; main(['--help'])",
    "from keylayers.cli import main; main(['rank', '--help'])",
    "from keylayers.cli import main; main(['train', '--help'])",
    "from keylayers.cli import main; main(['eval', '--help'])",
    "from keylayers.cli import main; main(['show', 'no-such-file.json'])",
    "import keylayers.ranking.ranking, keylayers.ranking.selection, keylayers.ranking.compare",
    "import keylayers.report.terminal, keylayers.report.html, keylayers.report.figures",
    "import keylayers.evaluation.measures, keylayers.report.evaluation",
    "import keylayers.ranking.certainty, keylayers.ranking.consensus",
    "import keylayers.export",
    "import keylayers.data.prepare",
]


def test_light_uses_import_no_torch():
    assert first_heavy(LIGHT) is None


def test_the_test_of_lightness_can_fail():
    loading = "sys.modules['torch'] = sys"  # as importing it does
    assert first_heavy(["import json", loading, "import ast"]) == loading


def test_help_takes_less_than_half_a_second_of_the_processor():
    """Processor time of the child: waiting for a busy machine does not count."""
    import resource

    def used():
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    command = [sys.executable, "-c", "from keylayers.cli import main; main(['--help'])"]
    seconds = []
    for _ in range(3):
        before = used()
        subprocess.run(command, capture_output=True, check=True, cwd=SOURCE.parent)
        seconds.append(used() - before)
    assert min(seconds) < 0.5
