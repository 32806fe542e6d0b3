# SPDX-License-Identifier: Apache-2.0
"""One published way to score modules a file."""
