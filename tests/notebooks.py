# SPDX-License-Identifier: Apache-2.0
"""Run the notebooks of examples/; `python tests/notebooks.py examples/*.ipynb` stores new outputs.

A notebook runs in an empty folder, offline, in this Python and with its commands first on the path.
Outputs are kept without times, styles, numbers of executions, and what libraries say on stderr.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
STYLE = re.compile(r"\x1b\[[0-9;]*m")  # a kernel asks commands for colours


def executed(file: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook after all its cells ran in `folder`; an error in a cell is raised."""
    notebook = nbformat.read(file, as_version=4)
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as sockets:  # not TCP: tests open no ports
        own = {"transport": "ipc", "ip": str(Path(sockets) / "kernel")}
        NotebookClient(
            notebook,
            config=Config({"KernelManager": own}),
            kernel_name="python3",
            timeout=600,
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        ).execute(env={**os.environ, **ENVIRONMENT, "PATH": commands})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                if "text" in output:
                    output.text = STYLE.sub("", output.text)
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            found = executed(Path(name), Path(place))
        found.metadata.pop("widgets", None)
        found.metadata.language_info = {"name": "python"}
        nbformat.write(found, name)
