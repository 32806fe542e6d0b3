# SPDX-License-Identifier: Apache-2.0
"""The integral of the gates' gradient from all closed to some open: who carries the loss reduction.

    s_i = -∫_0^1 ∂L/∂γ_i (γ = t on the open gates, 0 elsewhere) dt

The scores of the open gates sum to the loss reduction of their updates together (completeness).
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.task import MaskedModel


def path_shares(
    masked: MaskedModel, batches: list[Any], is_open: Float[Tensor, " gate"], num_points: int
) -> Float[Tensor, "batch gate"]:
    """Each open gate's share of the loss reduction on each batch, in nats; 0 for the others.

    Args:
        masked: The masked model.
        batches: What the loss is taken on.
        is_open: 1 for the gates that open together, 0 for those that stay closed.
        num_points: Gauss-Legendre points; n of them are exact for polynomials of degree 2n - 1.
    """
    shares = torch.zeros(len(batches), len(is_open), dtype=torch.float64)
    for row, batch in enumerate(batches):
        for point, weight in _gauss_legendre(num_points):
            shares[row] -= weight * masked.gradient(point * is_open, batch)
    return shares * is_open


def shares_in_one_sweep(
    masked: MaskedModel, batches: list[Any], is_open: Float[Tensor, " gate"]
) -> Float[Tensor, "batch gate"]:
    """Shares with one pass per batch: each batch is taken at its own point.

    Only the mean over the batches estimates the integral, a single row does not; so the spread of
    the rows overstates the error of their mean.
    """
    shares = torch.zeros(len(batches), len(is_open), dtype=torch.float64)
    points = _gauss_legendre(len(batches))
    for row, (batch, (point, weight)) in enumerate(zip(batches, points, strict=True)):
        shares[row] = -weight * len(batches) * masked.gradient(point * is_open, batch)
    return shares * is_open


@cache
def _gauss_legendre(num_points: int) -> tuple[tuple[float, float], ...]:
    """Points in (0, 1) and their weights."""
    points, weights = np.polynomial.legendre.leggauss(num_points)
    return tuple(
        (float(point + 1) / 2, float(weight) / 2)
        for point, weight in zip(points, weights, strict=True)
    )
