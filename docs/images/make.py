# SPDX-License-Identifier: Apache-2.0
"""Draw ranking.svg from a ranking: `python docs/images/make.py out/demo/polite/ranking.json`."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from keylayers.ranking import Ranking
from keylayers.report.terminal import heatmap


def main() -> None:
    """Write the picture beside this file."""
    console = Console(record=True, width=72, file=io.StringIO(), force_terminal=True)
    console.print(heatmap(Ranking.load(sys.argv[1])))
    drawn = console.export_svg(title="keylayers demo: polite answers, 1 is the most important")
    # rich links a web font; the picture must not call anybody
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
    Path(__file__).with_name("ranking.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
