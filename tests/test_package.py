# SPDX-License-Identifier: Apache-2.0
"""The house as docs/architecture.md draws it: public names, direction of imports, lightness."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "keylayers"

# From the lowest layer to the highest: a file imports from its own layer or a lower one.
LAYERS = (
    "_version errors options environment files validation yaml_values processes progress",
    "model updates trainers",
    "gates scores",
    "ranking",
    "data training evaluation apply export report demo",
    "commands cli __main__ integrations",
)
LAYER = {name: index for index, names in enumerate(LAYERS) for name in names.split()}
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


def test_imports_point_one_way_and_in_no_circle():
    graph = graph_of_imports()
    assert {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES} == set(LAYER)
    pairs = [(path, other) for path, others in graph.items() for other in others]
    assert len(pairs) > 200
    assert [pair for pair in pairs if layer_of(pair[1]) > layer_of(pair[0])] == []
    TopologicalSorter(graph).prepare()  # the error names the files


PUBLIC = """FreezeUnimportant KeylayersError Method Ranking Selection ShallowBackward StepScores
Verification __version__ agreement consensus curve_chart export_selection mask_curve measured_memory
module_weights rank_modules ranking_chart ranking_table register_method verify_ranking"""


def test_the_public_names_are_exact():
    import keylayers

    assert keylayers.__all__ == PUBLIC.split()
    for name in keylayers.__all__:
        assert getattr(keylayers, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = keylayers.nothing
    # or it would be a module for whoever asks after that file was imported
    assert not set(keylayers.__all__) & set(LAYER)


FIRST_HEAVY = """
import sys
for code in sys.argv[1:]:
    exec(code)
    if sys.modules.keys() & {"torch", "transformers", "peft", "trl", "datasets", "accelerate"}:
        sys.exit(code)
"""


def first_heavy(*codes):
    """The first of these lines that loads a heavy library, in a fresh process."""
    command = [sys.executable, "-c", FIRST_HEAVY, *codes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE.parent)
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
    "import keylayers.report.notebook",
    "import keylayers.evaluation.measures, keylayers.report.evaluation",
    "import keylayers.ranking.certainty, keylayers.ranking.consensus",
    "import keylayers.export",
]


def test_light_uses_import_no_torch():
    assert first_heavy(*LIGHT) is None
    loading = "sys.modules['torch'] = sys"  # as importing it does
    assert first_heavy("import json", loading, "import ast") == loading


def test_help_takes_less_than_half_a_second_of_the_processor():
    """Processor time of the child: waiting for a busy machine does not count."""
    code = (
        "from keylayers.cli import main; main(['--help']); import time; print(time.process_time())"
    )
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", code], cwd=SOURCE.parent).split()[-1])
        for _ in range(3)
    ]
    assert min(seconds) < 0.5
