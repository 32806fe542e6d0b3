# SPDX-License-Identifier: Apache-2.0
"""A selection applied to a model, each way with a proof that exactly the selection is trained."""
