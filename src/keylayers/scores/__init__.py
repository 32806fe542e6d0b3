# SPDX-License-Identifier: Apache-2.0
"""Methods that score modules: one function per file, one table of them in `methods.py`."""
