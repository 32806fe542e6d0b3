# SPDX-License-Identifier: Apache-2.0
"""Answers of models to questions, judged by another model."""
