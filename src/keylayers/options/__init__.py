# SPDX-License-Identifier: Apache-2.0
"""How the modules are scored: the options of the methods. Needs no torch."""

from keylayers.options.choices import METHOD_OPTIONS, Granularity, MaskOptimizer, Method
from keylayers.options.scoring import MaskOptions

__all__ = ["METHOD_OPTIONS", "Granularity", "MaskOptimizer", "MaskOptions", "Method"]
