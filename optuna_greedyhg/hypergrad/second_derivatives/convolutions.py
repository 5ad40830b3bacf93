"""Convolutions whose second derivative computes what is wanted.

PyTorch's second derivative of y = x ∗ w always gives all three of its results, for the gradient ȳ, the input x and the
weights w. A product u·∂g/∂α needs the first alone, unless α lies behind x or w. With X, W and B for the cotangents on
the first derivative's results, ȳ ∗ᵀ w, x ∗ᵀ ȳ and Σȳ for input, weights and bias, they are

    for ȳ:  X ∗ w + x ∗ W + B          for x:  ȳ ∗ᵀ W          for w:  X ∗ᵀ ȳ
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad.second_derivatives.base import Demand, Wanted, in_transform, is_plain


def convolve(
    n: int,
    demand: Demand,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    """``torch.conv1d``, ``conv2d`` or ``conv3d`` for n of 1, 2 or 3; ``None`` if it cannot be taken over."""
    tensors = input, weight, bias
    # An example may come without a batch.
    if not is_plain(*tensors) or in_transform(*tensors) or input.ndim != n + 2 or isinstance(padding, str):
        return None
    geometry = _Geometry(_repeated(stride, n), _repeated(padding, n), _repeated(dilation, n), groups)
    y: Tensor = _Convolution.apply(input, weight, bias, geometry, demand)  # type: ignore[no-untyped-call]
    return y


class _Geometry(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def convolve(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        none = [0] * len(self.stride)
        return torch.convolution(x, w, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def pull_back(self, y_bar: Tensor, x: Tensor, w: Tensor, wanted: Wanted) -> tuple[Any, Any, Any]:
        """ȳ ∗ᵀ w, x ∗ᵀ ȳ, and the bias's Σȳ; each ``None`` unless it is wanted."""
        none = [0] * len(self.stride)
        # torch.nn.grad has the same, one by one; this operator of the ATen core is what they call.
        backward = torch.ops.aten.convolution_backward.default
        geometry = (self.stride, self.padding, self.dilation, False, none, self.groups)
        x_bar, w_bar, bias_bar = backward(y_bar, x, w, [w.shape[0]], *geometry, [*wanted])
        return x_bar, w_bar, bias_bar


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: _Geometry, demand: Demand) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.demand = geometry, demand
        return geometry.convolve(x, w, bias)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        bars = _PulledBack.apply(y_bar, x, w, wanted, ctx.geometry, ctx.demand)  # type: ignore[no-untyped-call]
        return *bars, None, None


class _PulledBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_bar: Tensor, x: Tensor, w: Tensor, wanted: Wanted, geometry: _Geometry, demand: Demand
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(y_bar, x, w)
        ctx.geometry, ctx.demand = geometry, demand
        ctx.set_materialize_grads(False)
        return geometry.pull_back(y_bar, x, w, wanted)

    @staticmethod
    def backward(ctx: Any, X: Tensor | None, W: Tensor | None, B: Tensor | None) -> tuple[Tensor | None, ...]:
        y_bar, x, w = ctx.saved_tensors
        geometry = ctx.geometry
        terms = []
        if W is not None or B is not None:
            terms.append(geometry.convolve(x, torch.zeros_like(w) if W is None else W, B))
        if X is not None:
            terms.append(geometry.convolve(X, w, None))
        for_y = terms[0].add_(terms[1]) if len(terms) == 2 else next(iter(terms), None)
        for_x, for_w = None, None
        if ctx.demand.inputs:
            if W is not None and ctx.needs_input_grad[1]:
                for_x, *_ = geometry.pull_back(y_bar, x, W, (True, False, False))
            if X is not None and ctx.needs_input_grad[2]:
                _, for_w, _ = geometry.pull_back(y_bar, X, w, (False, True, False))
        return for_y, for_x, for_w, None, None, None


FUNCTIONS = (_Convolution, _PulledBack)


def _repeated(size: int | Sequence[int], n: int) -> list[int]:
    """A size for each of n dimensions."""
    return [size] * n if isinstance(size, int) else [*size] * (n // len(size))
