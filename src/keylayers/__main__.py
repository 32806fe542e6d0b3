# SPDX-License-Identifier: Apache-2.0
"""`python -m keylayers`, and so `accelerate launch -m keylayers`."""

from keylayers.cli import run

if __name__ == "__main__":
    run()
