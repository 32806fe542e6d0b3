# SPDX-License-Identifier: Apache-2.0
"""The built-in model and data, and how they were made."""
