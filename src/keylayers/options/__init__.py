# SPDX-License-Identifier: Apache-2.0
"""Every option of a run, once: the fields are the flags, their help and the YAML keys.

Field names are unique across the classes, because a sub-command shows those it needs side by side.
Needs no torch. Defaults are keylayers' own unless a comment gives the paper's.
"""

from keylayers.options.choices import (
    LOSS_UNITS,
    METHOD_OPTIONS,
    Control,
    DataFormat,
    Dtype,
    FreezeAction,
    Granularity,
    MaskData,
    MaskOptimizer,
    Method,
    Objective,
    Towers,
    UpdateKind,
)
from keylayers.options.commands import (
    PruneOptions,
    RankOptions,
    TrainOptions,
    VerifyOptions,
)
from keylayers.options.evaluation import (
    BenchmarkOptions,
    ComparedOptions,
    EvalOptions,
    EvalRunOptions,
    LossOptions,
    ProblemOptions,
)
from keylayers.options.inputs import (
    DataOptions,
    ModelOptions,
    UpdateOptions,
)
from keylayers.options.scoring import (
    CurveOptions,
    MaskOptions,
)
from keylayers.options.selection import (
    BudgetOptions,
    SelectionOptions,
)
from keylayers.options.training import (
    ObjectiveOptions,
    StabilityOptions,
    TrainingOptions,
)

__all__ = [
    "LOSS_UNITS",
    "METHOD_OPTIONS",
    "BenchmarkOptions",
    "BudgetOptions",
    "ComparedOptions",
    "Control",
    "CurveOptions",
    "DataFormat",
    "DataOptions",
    "Dtype",
    "EvalOptions",
    "EvalRunOptions",
    "FreezeAction",
    "Granularity",
    "LossOptions",
    "MaskData",
    "MaskOptimizer",
    "MaskOptions",
    "Method",
    "ModelOptions",
    "Objective",
    "ObjectiveOptions",
    "ProblemOptions",
    "PruneOptions",
    "RankOptions",
    "SelectionOptions",
    "StabilityOptions",
    "Towers",
    "TrainOptions",
    "TrainingOptions",
    "UpdateKind",
    "UpdateOptions",
    "VerifyOptions",
]
