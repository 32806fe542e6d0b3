# SPDX-License-Identifier: Apache-2.0
"""Write the tables of README.md and docs/ from the records; a test compares them.

    python experiments/pages.py

A page holds a table between `<!-- name -->` and `<!-- /name -->`, where name is a function below.
"""

import real_model
import small_adapters

import findings
import performance
import small_study
from tables import ROOT, filled

TABLES = (
    *findings.TABLES,
    *small_study.TABLES,
    *performance.TABLES,
    *small_adapters.TABLES,
    *real_model.TABLES,
)
DOCS = ("methods.md", "claims.md", "budgets.md", "performance.md", "parts.md")
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / page for page in DOCS),
    ROOT / "experiments" / "RESULTS.md",
)

if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
