"""Arithmetic on ``dict[str, Tensor]``: parameters, gradients, hyperparameters and their estimates.

Every function returns a new dictionary and leaves its arguments alone. Two trees that meet must have the same keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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


def scale(factor: Tensor | float, x: Mapping[str, Tensor]) -> Tensors:
    """``factor·x``."""
    return {name: factor * x[name] for name in x}


def add_scaled(x: Mapping[str, Tensor], factor: float, y: Mapping[str, Tensor]) -> Tensors:
    """``x + factor·y``."""
    return {name: torch.add(x[name], y[name], alpha=factor) for name in x}


def lerp(x: Mapping[str, Tensor], y: Mapping[str, Tensor], beta: float) -> Tensors:
    """``(1 − beta)·x + beta·y``."""
    return {name: torch.lerp(x[name], y[name], beta) for name in x}


def stack(trees: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """One tree, of the trees' tensors side by side along a new first dimension."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def unstack(tree: Mapping[str, Tensor], n: int) -> list[Tensors]:
    """The n trees that were stacked, as copies, so that one that is kept does not keep them all."""
    parts = {name: [part.clone() for part in x.unbind()] for name, x in tree.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(n)]


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


def finite_entries(tensors: Iterable[Tensor]) -> list[bool]:
    """Of each entry of the tensors' common first dimension, whether nothing in it is NaN or infinite."""
    checks = [torch.isfinite(x.flatten(1) if x.ndim > 1 else x[:, None]).all(dim=1) for x in tensors]
    whole: list[bool] = torch.stack(checks).all(dim=0).tolist()
    return whole


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite. Waits for the device once, whatever the number of tensors."""
    checks = [torch.isfinite(x).all() for x in tensors]
    return not checks or bool(torch.stack(checks).all())
