# SPDX-License-Identifier: Apache-2.0
"""Rankings, budgets, selections and their comparison. Needs no torch."""
