"""The training loss's Hessian, of which nothing is known but its products: linear systems, leading eigenpairs."""

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


class Eigenpairs(NamedTuple):
    """Approximate eigenpairs of a symmetric matrix, those of the largest absolute value.

    Attributes:
        values: Shape (k,).
        vectors: Orthonormal rows, shape (k, P).
    """

    values: Tensor
    vectors: Tensor


def block_iterations(matvec: Callable[[Tensor], Tensor], start: Tensor, n_iterations: int) -> Eigenpairs:
    """Block power iterations, and a Rayleigh–Ritz step in the space that they have found.

    Each costs one product for every row. An eigenvector of value λ_i is found the faster, the smaller |λ_{k+1}/λ_i|.
    The last product gives the Ritz values and, as one power iteration more, the vectors too.

    Args:
        matvec: Products of the matrix with rows of shape (k, P).
        start: Rows to start from, shape (k, P); they need not be orthogonal, and no more than P pairs are found.
        n_iterations: Number of products with the whole block, at least 1.

    Returns:
        The eigenpairs, the largest absolute value first; all NaN where a product was not finite, as after training that
        has diverged.
    """
    if len(start) == 0:
        return Eigenpairs(start.new_zeros(0), start)
    basis = torch.linalg.qr(start.T).Q  # columns
    for _ in range(n_iterations - 1):
        basis = torch.linalg.qr(matvec(basis.T).T).Q
    image = matvec(basis.T).T
    projected = basis.T @ image
    if not bool(torch.isfinite(projected).all()):  # for which eigh may raise an error
        return Eigenpairs(torch.full_like(projected[0], torch.nan), torch.full_like(basis.T, torch.nan))
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    # The textbook has basis·rotation; without the last product, a refresh of one iteration would not leave its space.
    # Columns of value 0 come last, as QR fills them with anything that is orthogonal to those before.
    order = values.abs().argsort(descending=True)
    return Eigenpairs(values[order], torch.linalg.qr(image @ rotation[:, order]).Q.T)
