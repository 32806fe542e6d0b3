# SPDX-License-Identifier: Apache-2.0
"""Anyone's Trainer: its loss, batches and state, given back as they were."""
