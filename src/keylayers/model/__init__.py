# SPDX-License-Identifier: Apache-2.0
"""Models: their modules, loading, weights."""
