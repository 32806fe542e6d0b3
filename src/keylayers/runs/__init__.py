# SPDX-License-Identifier: Apache-2.0
"""What a person runs, from options to files on disk: one file each."""
