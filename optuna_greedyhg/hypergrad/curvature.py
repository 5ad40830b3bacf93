"""The training loss's Hessian, of which nothing is known but its products: linear systems, Ritz pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.trees import Tensors

MatVec = Callable[[Tensors], Tensors]


class LinearSolver(Protocol):
    """Solves M·x = b for a linear map M that is given by its products."""

    def __call__(self, matvec: MatVec, b: Tensors) -> Tensors:
        """An approximate solution x, a tree like ``b``."""


@dataclass(frozen=True)
class Neumann:
    """The first terms of Neumann's series, which converges where scale·M has its eigenvalues in (0, 2):

        x = scale · Σ_{j=0..K} (I − scale·M)^j · b

    Args:
        n_terms: Number K of products.
        scale: A step size, often the learning rate of training.

    Raises:
        ValueError: If ``n_terms`` is negative or ``scale`` not positive.
    """

    n_terms: int = 5
    scale: float = 0.1

    def __post_init__(self) -> None:
        if self.n_terms < 0 or not self.scale > 0:
            raise ValueError(f"n_terms must be at least 0 and scale above 0, but got {self}.")

    def __call__(self, matvec: MatVec, b: Tensors) -> Tensors:
        term = total = b
        for _ in range(self.n_terms):
            term = trees.add_scaled(term, -self.scale, matvec(term))
            total = trees.add(total, term)
        return trees.scale(self.scale, total)


@dataclass(frozen=True)
class ConjugateGradients:
    """Conjugate gradients for (M + damping·I)·x = b with M symmetric, from x = 0.

    Stops after ``max_steps`` products, at a residual of ``tolerance``·‖b‖, or where the map turns out not to be
    positive definite in the next direction, as a network's Hessian is not; what it has got to by then is returned.

    Args:
        max_steps: The largest number of products.
        damping: What is added to the diagonal.
        tolerance: The relative residual to reach.

    Raises:
        ValueError: If ``max_steps`` is below 1, or another number is negative.
    """

    max_steps: int = 10
    damping: float = 0.0
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.max_steps < 1 or self.damping < 0 or self.tolerance < 0:
            raise ValueError(f"max_steps must be at least 1, damping and tolerance at least 0, but got {self}.")

    def __call__(self, matvec: MatVec, b: Tensors) -> Tensors:
        x = trees.zeros_like(b)
        residual = direction = b
        rr = trees.dot(residual, residual)
        goal = self.tolerance**2 * rr
        for _ in range(self.max_steps):
            if rr <= goal:
                break
            image = trees.add_scaled(matvec(direction), self.damping, direction)
            curvature = trees.dot(direction, image)
            if curvature <= 0:
                break
            length = float(rr / curvature)
            x = trees.add_scaled(x, length, direction)
            residual = trees.add_scaled(residual, -length, image)
            rr, previous = trees.dot(residual, residual), rr
            direction = trees.add_scaled(residual, float(rr / previous), direction)
        return x


class RitzPairs(NamedTuple):
    """Approximate eigenpairs of a symmetric matrix, from the Krylov space of one vector.

    Attributes:
        values: Shape (k,), ascending.
        vectors: Orthonormal rows, shape (k, P).
        quotient: The Rayleigh quotient of the vector itself, shape (1,); empty for k = 0.
    """

    values: Tensor
    vectors: Tensor
    quotient: Tensor


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, n_vectors: int) -> RitzPairs:
    """Ritz pairs of a symmetric matrix A in span{x, Ax, ..., A^(k−1)x}.

    Each vector costs one product. They are orthogonalised against all others, as the plain recurrence loses that. Where
    the space is exhausted early, what is left are pairs of value 0 with a vector of zeros.

    Args:
        matvec: Products of the matrix with rows of shape (1, P).
        start: The vector x, shape (P,).
        n_vectors: The dimension k of the space.

    Returns:
        The pairs; NaN where a product was not finite, as after training that has diverged.
    """
    basis, image = start.new_zeros(0, len(start)), start
    images = [basis]
    negligible = torch.finfo(start.dtype).eps ** 0.5
    for _ in range(n_vectors):
        x = image
        for _ in range(2):  # twice is enough (Parlett)
            x = x - (basis @ x) @ basis
        length = torch.linalg.vector_norm(x)
        x = torch.where(length > negligible * torch.linalg.vector_norm(image), x / length, 0.0)  # without a wait
        basis = torch.cat([basis, x.unsqueeze(0)])
        images.append(matvec(x.unsqueeze(0)))
        image = images[-1][0]
    projected = torch.cat(images) @ basis.T
    # For what is not finite eigh may raise an error, and nobody should wait to find out.
    finite = torch.isfinite(projected).all()
    symmetric = torch.where(finite, (projected + projected.T) / 2, 0.0)
    # LAPACK knows no half precision.
    values, rotation = torch.linalg.eigh(symmetric.to(torch.promote_types(start.dtype, torch.float32)))
    values, rotation = (torch.where(finite, x, torch.nan).to(start.dtype) for x in (values, rotation))
    return RitzPairs(values, rotation.T @ basis, projected.diagonal()[:1])
