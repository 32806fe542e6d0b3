# SPDX-License-Identifier: Apache-2.0
"""Rankings made by hand for tests."""

from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking


def ranking_of(
    scores, *, num_parameters=10, errors=None, provenance=None, method="by hand", **options
):
    """A ranking of modules named by block and projection, two projections a block.

    Parameters and standard errors are those of each module, or of all.
    """
    columns = [
        column if isinstance(column, list) else [column] * len(scores)
        for column in (num_parameters, scores, errors)
    ]
    modules = tuple(
        RankedModule(f"model.layers.{index // 2}.{kind}", index // 2, kind, *row)
        for index, row in enumerate(zip(*columns, strict=True))
        for kind in [f"{'ab'[index % 2]}_proj"]
    )
    return Ranking(modules, method, provenance=provenance or {}, **options)


def grid_of(columns, errors=None):
    """Projection -> the scores of its modules by block; "absent" where a block has none."""
    modules = tuple(
        RankedModule(f"layers.{block}.{projection}", block, projection, 10, scores[block], errors)
        for block in range(max(map(len, columns.values())))
        for projection, scores in columns.items()
        if block < len(scores) and scores[block] != "absent"
    )
    return Ranking(modules, "by hand")


def run_of(*, name="m", weights="w", content="a", options=None, sections=None, **more):
    """A ranking with a record such as `keylayers rank` writes, and other sections of it."""
    made_by = {
        "model": {"name": name, "weights_sha256": weights},
        "data": {"data": f"{content}.jsonl", "content_sha256": content},
        "options": {"seed": 0, "mask_seed": 3} | (options or {}),
        **(sections or {}),
    }
    return ranking_of([3.0, 2.0, 1.0, 0.0], provenance=made_by, **{"method": "ila"} | more)


def write_rankings(folder):
    """Name -> file: two seeds with standard errors, other data, and a model of another shape."""
    made = {
        "seed-0": run_of(errors=0.5),
        "seed-1": run_of(errors=0.5, options={"seed": 1}),
        "data": run_of(content="b"),
        "deep": grid_of({"a_proj": [3.0, 2.0, 1.0], "c_proj": [1.0, 2.0, None]}),
    }
    for name, ranking in made.items():
        ranking.save(folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in made}
