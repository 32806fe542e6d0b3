# SPDX-License-Identifier: Apache-2.0
"""Data formats, chat templates, preferences and splits."""
