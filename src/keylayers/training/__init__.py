# SPDX-License-Identifier: Apache-2.0
"""The training path, its objectives and its callbacks."""
