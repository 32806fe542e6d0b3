# SPDX-License-Identifier: Apache-2.0
"""Rankings for people to look at; needs no torch."""
