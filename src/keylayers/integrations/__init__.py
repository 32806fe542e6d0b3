# SPDX-License-Identifier: Apache-2.0
"""Plugins for other tools: one file per tool, which imports that tool."""
