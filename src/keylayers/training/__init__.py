# SPDX-License-Identifier: Apache-2.0
"""Data, and the one training path."""
