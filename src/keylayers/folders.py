# SPDX-License-Identifier: Apache-2.0
"""Old name of keylayers.environment and keylayers.files, until every import has changed."""

# ruff: noqa
from keylayers.environment import *
from keylayers.files import *
from keylayers.files import WHAT_TO_DO as KEPT
