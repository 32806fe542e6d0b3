# SPDX-License-Identifier: Apache-2.0
"""Methods that score modules: one plain function a file, one explicit table of them.

Every function takes a trainer, the updates of its model, options and a function to report steps to,
and gives a score for each update's module; higher is more important.
"""

from collections.abc import Callable, Sequence

from transformers import Trainer

from keylayers.mask.module_scores import ModuleScores
from keylayers.options import MaskOptions, Method
from keylayers.progress import OnStep
from keylayers.scores.ila import ila
from keylayers.scores.path import path
from keylayers.updates import Update

ScoreFunction = Callable[[Trainer, Sequence[Update], MaskOptions, OnStep | None], ModuleScores]

METHODS: dict[Method, ScoreFunction] = {"ila": ila, "path": path}
