"""Orthogonal matrices: Hadamard matrices of many sizes, random ones, and principal components.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows, H Hᵀ = n I. Sizes are doubled by

    H_2n = [[H_n, H_n], [H_n, -H_n]]                                                                Sylvester 1867

from 1, or from a size that Paley's constructions give: q + 1 for a prime q = 3 mod 4, and 2 (q + 1) for a prime q = 1 mod 4.
With χ(a) = 1 where a is a square mod q, -1 where it is not, 0 for a = 0, and Q_ij = χ(i - j),

    I:   H = I + [[0, 1ᵀ], [-1, Q]]
    II:  H = S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]],   S = [[0, 1ᵀ], [1, Q]]

Paley 1933, On Orthogonal Matrices. Head sizes and widths of models are nearly all of these sizes: 96 = 8 · 12, 640 = 32 · 20.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sympy import isprime

from lissom.compiler.calibration.hessian import damped, unpredicted

DAMPING = 0.01
"""The fraction of the mean variance that is added to every direction, so that rare ones are not divided by zero."""
STEPS, LAYERS = 80, 8
"""Steps of Adam for nested components, and the layers in each."""
_DOUBLE = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def hadamard(size: int) -> torch.Tensor | None:
    """The Hadamard matrix over √size, which is orthogonal, [size, size] in float64; None where no construction gives one."""
    signs = _signs(size)
    return None if signs is None else signs / size**0.5


def _signs(size: int) -> torch.Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 2:
        return None
    half = _signs(size // 2)
    if half is not None:
        return torch.kron(_DOUBLE, half)
    if size % 4 == 0 and isprime(size - 1):
        return _first_of_paley(size - 1)
    if size % 4 == 0 and isprime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return _second_of_paley(size // 2 - 1)
    return None


def _squares(q: int) -> torch.Tensor:
    """Q, [q, q]."""
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index) % q]


def _bordered(q: int, corner: float) -> torch.Tensor:
    """Q below a row of ones, beside a column of `corner`."""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, corner, _squares(q)
    return matrix


def _first_of_paley(q: int) -> torch.Tensor:
    return _bordered(q, -1) + torch.eye(q + 1, dtype=torch.float64)


def _second_of_paley(q: int) -> torch.Tensor:
    negative = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1), _DOUBLE) + torch.kron(torch.eye(q + 1, dtype=torch.float64), negative)


def random_basis(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix, uniformly distributed, [size, size] in float64.

    Mezzadri 2007, How to Generate Random Matrices from the Classical Compact Groups, §5.
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def principal_components(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The basis whose first k channels, for every k, predict Σ_r W_r x best, [size, size] in float64.

    For C = E[x xᵀ] and B = Σ_r W_rᵀ W_r, the error that is left when x is fitted from the channels Kᵀ x is least for

        K = C^-½ Y      Y: the first eigenvectors of C^½ B C^½, largest first

    and the QR decomposition of all of K gives an orthogonal basis of these nested spaces. With B = I these are the principal
    components of x, as in SliceGPT, which does not weigh channels by what the layers make of them.

    Args:
        gram: C.
        weights: B.
    """
    gram = damped(gram, 0.1 * DAMPING)
    values = torch.linalg.eigh(_power(gram, 0.5) @ weights @ _power(gram, 0.5))
    return torch.linalg.qr(_power(gram, -0.5) @ values.eigenvectors.flip(1)).Q


def nested_components(basis: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The basis improved for all layers at once, each with a C and a B of its own, [size, size] in float64.

    Adam lowers, over orthogonal Q and for U the first k columns of Q, with a random k in each step, of half the size or more,

        Σ_l tr B_l (C_l - C_l U (Uᵀ C_l U)⁻¹ Uᵀ C_l)

    which is what no refit of W_l on Uᵀ x recovers of W_l x.

    Args:
        basis: where to begin.
        layers: C and B of each, see `principal_components`.
    """
    size, generator = len(basis), torch.Generator().manual_seed(0)
    parts = [(damped(gram, 1e-5).float(), weights.float()) for gram, weights in layers]
    free = basis.float().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.05 / size**0.5)
    for _ in range(STEPS):
        kept = int(torch.randint((size + 1) // 2, size + 1, (), generator=generator))
        chosen = torch.randperm(len(parts), generator=generator)[:LAYERS].tolist()
        with torch.enable_grad():
            first = torch.linalg.qr(free).Q[:, :kept]
            reads = ((*parts[index], parts[index][0] @ first) for index in chosen)
            loss = torch.stack([unpredicted(gram, own, read, first.T @ read) for gram, own, read in reads]).mean()
            (free.grad,) = torch.autograd.grad(loss, [free])
        optimizer.step()
    return torch.linalg.qr(free.detach().double()).Q


def balanced(keys: torch.Tensor, queries: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and A⁻ᵀ: the bases of keys and of queries in which quantized keys change the scores least, each [size, size].

    A quantized key k A + e, with a scale per token, has an error of E‖e‖² ∝ tr(Aᵀ Σ_k A), spread evenly by the orthogonal
    factor of A, and changes the scores by E(q A⁻ᵀ e)² ∝ tr(A⁻¹ Σ_q A⁻ᵀ). Their product is least, the square of the nuclear norm
    of Σ_k^½ Σ_q^½, for

        A = M^½ H,   M = Σ_k^-½ (Σ_k^½ Σ_q Σ_k^½)^½ Σ_k^-½

    which is the geometric mean of Σ_k⁻¹ and Σ_q. Hadamard bases alone have M = I.

    Args:
        keys: Σ_k, the covariance of keys, [size, size] in float64.
        queries: Σ_q, the second moment of queries, up to a factor.
        basis: H, orthogonal.
    """
    keys, queries = damped(keys, DAMPING), damped(queries, DAMPING)
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    mean = inverse @ _power(root @ queries @ root, 0.5) @ inverse
    mean = (mean + mean.T) / 2
    # A factor on one side and its inverse on the other change nothing: keys keep their size.
    mean = mean * (keys.trace() / (mean @ keys).trace())
    return _power(mean, 0.5) @ basis, _power(mean, -0.5) @ basis


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(values[-1] * 1e-12).pow(exponent) @ vectors.T
