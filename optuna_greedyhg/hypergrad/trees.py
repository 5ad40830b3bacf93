"""Arithmetic on ``dict[str, Tensor]``: parameters, gradients, hyperparameters and their estimates.

Every function returns a new dictionary and leaves its arguments alone. Two trees that meet must have the same keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def zeros_like(tree: Mapping[str, Tensor]) -> Tensors:
    """0, of the same shapes."""
    return {name: torch.zeros_like(x) for name, x in tree.items()}


def clone(tree: Mapping[str, Tensor]) -> Tensors:
    """Copies that share neither memory nor graph with ``tree``."""
    return {name: x.detach().clone() for name, x in tree.items()}


def leaves(tree: Mapping[str, Tensor]) -> Tensors:
    """The same numbers as fresh leaves of a graph, each with ``requires_grad``."""
    return {name: x.detach().requires_grad_() for name, x in tree.items()}


def add(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensors:
    """``x + y``."""
    return {name: x[name] + y[name] for name in x}


def sub(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensors:
    """``x − y``."""
    return {name: x[name] - y[name] for name in x}


def scale(factor: float, x: Mapping[str, Tensor]) -> Tensors:
    """``factor·x``."""
    return {name: factor * x[name] for name in x}


def add_scaled(x: Mapping[str, Tensor], factor: float, y: Mapping[str, Tensor]) -> Tensors:
    """``x + factor·y``."""
    return {name: torch.add(x[name], y[name], alpha=factor) for name in x}


def lerp(x: Mapping[str, Tensor], y: Mapping[str, Tensor], beta: float) -> Tensors:
    """``(1 − beta)·x + beta·y``."""
    return {name: torch.lerp(x[name], y[name], beta) for name in x}


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([x.flatten() for x in tree.values()])


def flatten_rows(tree: Mapping[str, Tensor]) -> Tensor:
    """A tree of stacked tensors as a matrix: one row for each entry of their first dimension."""
    return torch.cat([x.flatten(1) for x in tree.values()], dim=1)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """The tree, shaped like another, whose entries are the last dimension of ``vector``; other dimensions lead."""
    parts = torch.split(vector, [x.numel() for x in like.values()], dim=-1)
    lead = vector.shape[:-1]
    return {name: part.reshape((*lead, *x.shape)) for (name, x), part in zip(like.items(), parts, strict=True)}


def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    """``Σ x·y`` over all entries, a 0-dimensional tensor."""
    return torch.stack([torch.sum(x[name] * y[name]) for name in x]).sum()


def norm(x: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm over all entries, a 0-dimensional tensor."""
    result: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in x.values()]))
    return result


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite. Waits for the device once, whatever the number of tensors."""
    checks = [torch.isfinite(x).all() for x in tensors]
    return not checks or bool(torch.stack(checks).all())
