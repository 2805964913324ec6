"""The Hessian of a layer's squared error, H = XᵀX, and the Cholesky factor of its inverse for second-order methods."""

from __future__ import annotations

import torch


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """XᵀX + λI, float64.

    Args:
        gram: XᵀX, [features, features]. λ is `damping` times the mean of its diagonal; features that are always zero count as
            one.
    """
    hessian = gram.to(torch.float64, copy=True)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return hessian


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of (XᵀX + λI)⁻¹, float32, computed in float64.

    Args:
        gram: as in `damped`.
        damping: as in `damped`.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))
    return torch.linalg.cholesky(inverse, upper=True).float()


def shifted(weight: torch.Tensor, gram: torch.Tensor, shift: torch.Tensor, pull: float) -> torch.Tensor:
    """The weights V that minimize Σ ‖V·x - W·x₀‖² + λ ‖V - W‖²: W (I + Σ (x₀ - x)·xᵀ (XᵀX + λI)⁻¹).

    Args:
        weight: W, [out_features, in_features].
        gram: XᵀX.
        shift: Σ (x₀ - x)·xᵀ; λ is `pull` times the mean of the diagonal of XᵀX.
    """
    factor = torch.linalg.cholesky(damped(gram, pull))
    missing = weight.double() @ shift.double()
    return (weight + torch.cholesky_solve(missing.T, factor).T).float()
