"""Operators whose second derivative is another than PyTorch's, which computes too much, or is wrong.

*Convolutions.* PyTorch's second derivative of y = x ∗ w always gives all three of its results, for the gradient ȳ, the
input x and the weights w, whichever of them are wanted. A product u·∂g/∂α needs the first alone, unless α lies behind
x or w. With X, W and B for the cotangents on the first derivative's results, ȳ ∗ᵀ w, x ∗ᵀ ȳ and Σȳ for input, weights
and bias, they are

    for ȳ:  X ∗ w + x ∗ W + B          for x:  ȳ ∗ᵀ W          for w:  X ∗ᵀ ȳ

*Weight normalization*, w = g·v/‖v‖, is a fused operator in PyTorch, which has no forward derivative, and whose second
derivative fails PyTorch's own check. Here it is computed as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

_N_DIMENSIONS: dict[Callable[..., Tensor], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@dataclass
class Demand:
    """What the next pass through second derivatives is for; shared by all convolutions of one graph.

    Autograd knows which results are wanted, and does not tell a function of Python's.

    Attributes:
        inputs: Whether the derivatives for x and w are wanted: if the product is with weights, or α lies behind them.
    """

    inputs: bool = True


Wanted = tuple[bool, bool, bool]
"""Whether the derivatives with respect to input, weights and bias are wanted."""


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


class LeanConvolutions(TorchFunctionMode):
    """Within it, ``torch.conv1d``, ``conv2d`` and ``conv3d`` have this second derivative, whoever calls them.

    Attributes:
        found: Whether there has been one.
    """

    def __init__(self, demand: Demand) -> None:
        super().__init__()
        self.found = False
        self._demand = demand

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        n = _N_DIMENSIONS.get(function)
        if n is not None and (taken := _taken(n, *args, **kwargs)) is not None:
            self.found = True
            x, w, bias, geometry = taken
            return _Convolution.apply(x, w, bias, geometry, self._demand)  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)


class PlainWeightNorm(TorchFunctionMode):
    """Within it, ``torch.nn.utils.parametrizations.weight_norm`` computes what it stands for, by plain arithmetic."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # The operator, and the classes below, are private in PyTorch; there is no other way to know them.
        return (_weight_norm if function is torch._weight_norm else function)(*args, **(kwargs or {}))


def has_weight_norm(module: nn.Module) -> bool:
    """Whether a part of it has its weights normalized, by a parametrization or, as before torch 2, by a hook."""
    hooks = (hook for part in module.modules() for hook in part._forward_pre_hooks.values())
    names = {type(part).__name__ for part in (*module.modules(), *hooks)}
    return not names.isdisjoint({"_WeightNorm", "WeightNorm"})


def convolutions_among(nodes: Iterable[Node]) -> set[Node]:
    """Those nodes of a graph that are convolutions which have been taken over."""
    names = {f"{cls.__name__}Backward" for cls in (_Convolution, _PulledBack)}
    return {node for node in nodes if type(node).__name__ in names}


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # Of all entries, norm_except_dim gives forward derivatives of another shape than its result.
    norm = torch.linalg.vector_norm(v) if dim == -1 else torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)


def _taken(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, _Geometry] | None:
    """The arguments of a convolution, if it is one that can be taken over."""
    plain = type(input) is Tensor and input.ndim == n + 2  # an example without a batch, or a tensor of another kind
    if not plain or isinstance(padding, str) or torch.is_autocast_enabled(input.device.type) or _in_transform():
        return None
    geometry = _Geometry(_repeated(stride, n), _repeated(padding, n), _repeated(dilation, n), groups)
    return input, weight, bias, geometry


def _in_transform() -> bool:
    """Whether a loss is using ``torch.func`` itself, in which torch.autograd.Function asks the same, in private."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def _repeated(size: int | Sequence[int], n: int) -> list[int]:
    """A size for each of n dimensions."""
    return [size] * n if isinstance(size, int) else [*size] * (n // len(size))


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
