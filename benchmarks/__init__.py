# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: both sides in one run, alternating; ratios with spread. `make bench` runs them."""
