# SPDX-License-Identifier: Apache-2.0
"""Rankings made by hand for tests."""

from keylayers.files import json_sha256
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.verification import MaskCurve, Verification


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


FALLING = (3.0, 2.0, 1.0, 0.0)


def run_of(scores=FALLING, name="m", weights="w", content="a", options=(), sections=(), **more):
    """A ranking with a record such as `keylayers rank` writes, and other sections of it."""
    made_by = {
        "model": {"name": name, "weights_sha256": weights},
        "data": {"data": f"{content}.jsonl", "content_sha256": content},
        "options": {"seed": 0, "mask_seed": 3, **dict(options)},
        **dict(sections),
    }
    return ranking_of(list(scores), provenance=made_by, **{"method": "ila"} | more)


def verification_of(ranking, **options):
    """What `keylayers verify` might have found of a ranking of six modules."""

    def curve(*losses):
        rows = tuple((loss, loss + 0.1) for loss in losses)
        return MaskCurve(
            counts=(0, 1, 2, 3, 4, 5, 6), losses=losses, batch_losses=rows, batch_weights=(1.0, 1.0)
        )

    return Verification(
        ranking_sha256=json_sha256(ranking.to_json()),
        best_first=curve(3.0, 1.5, 1.2, 1.1, 1.05, 1.02, 1.0),
        worst_first=curve(3.0, 2.9, 2.8, 2.5, 2.0, 1.5, 1.0),
        random=(curve(3.0, 2.5, 2.0, 1.8, 1.5, 1.2, 1.0),),
        **options,
    )
