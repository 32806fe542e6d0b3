# SPDX-License-Identifier: Apache-2.0
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

"""Rankings made by hand for tests."""


def ranking_of(scores, *, num_parameters=10, provenance=None, **options):
    """A ranking of modules named by block and projection, two projections a block."""
    sizes = num_parameters if isinstance(num_parameters, list) else [num_parameters] * len(scores)
    modules = tuple(
        RankedModule(
            name=f"model.layers.{index // 2}.{'ab'[index % 2]}_proj",
            block_index=index // 2,
            projection=f"{'ab'[index % 2]}_proj",
            num_parameters=size,
            score=score,
        )
        for index, (score, size) in enumerate(zip(scores, sizes, strict=True))
    )
    return Ranking(modules, "by hand", provenance=provenance or {}, **options)
