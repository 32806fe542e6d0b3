# SPDX-License-Identifier: Apache-2.0
"""The masked model: when to learn the mask, how, and how good it is."""
