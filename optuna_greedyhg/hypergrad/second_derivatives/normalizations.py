"""Normalizations whose second derivative takes few operations, and computes what is wanted.

All are y = γ·x̂ + β with x̂ = r·(x − m(x)) and r = 1/√(m((x − m(x))²) + ε), where m is the mean over the entries that
are normalized together. With the projection P v = v − m(v) − x̂·m(x̂·v), the derivative of x̂ is r·P, which is symmetric;
so the first derivative's results for x, γ and β are r·P(γ·ȳ), Σȳ·x̂ and Σȳ. With X, G and B for the cotangents on them,

    for ȳ:  γ·r·P X + G·x̂ + B
    for γ:  Σ ȳ·r·P X
    for x:  r·P(G·ȳ − r·(m(x̂·u)·X + m(x̂·X)·u)) − r·m(u·r·P X)·x̂        with u = γ·ȳ

PyTorch has r·P as one operator, the first derivative without γ. Its own second derivatives take some thirty operations
for all three, and those of batch and layer normalization are wrong when they are differentiated in turn, as they take
the statistics for constants: a loss with a penalty on gradients is therefore differentiated as y is written above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from optuna_greedyhg.hypergrad.second_derivatives.base import Demand, Wanted, in_transform, is_plain

# torch.nn has no functions for these derivatives; the operators of the ATen core are what autograd calls.
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def batch_norm(
    demand: Demand,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.batch_norm``; ``None`` if it cannot be taken over, as outside training."""
    single = input.ndim < 2 or input.numel() == input.shape[1]  # of which torch.nn.functional says what is wrong
    within_running = in_transform() and running_mean is not None
    if not training or single or within_running or not _can_take(input, weight, bias):
        return None

    def forward(x: Tensor, w: Tensor | None, bias: Tensor | None) -> Bars:
        return torch.native_batch_norm(x, w, bias, running_mean, running_var, True, momentum, eps)

    def again(x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.batch_norm(x, mean, r**-2 - eps, w, bias, False, eps=eps)

    def pull_back(y_bar: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, wanted: Wanted) -> Bars:
        bars: Bars = _batch_norm_backward(y_bar, x, w, None, None, mean, r, True, eps, [*wanted])
        return bars

    dims, by_channel = [d for d in range(input.ndim) if d != 1], [input.shape[1], *[1] * (input.ndim - 2)]
    return _normalized(input, weight, bias, _Kind(dims, by_channel, by_channel, eps, forward, again, pull_back), demand)


def layer_norm(
    demand: Demand,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.layer_norm``; ``None`` if it cannot be taken over."""
    if not _can_take(input, weight, bias):
        return None
    shape = [*normalized_shape]

    def forward(x: Tensor, w: Tensor | None, bias: Tensor | None) -> Bars:
        return torch.native_layer_norm(x, shape, w, bias, eps)

    def again(x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.layer_norm(x, shape, w, bias, eps)

    def pull_back(y_bar: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, wanted: Wanted) -> Bars:
        like_bias = x.new_empty(shape) if wanted[2] else None  # of which the operator reads the shape alone
        bars: Bars = _layer_norm_backward(y_bar, x, shape, mean, r, w, like_bias, [*wanted])
        return bars

    dims, by_example = [*range(-len(shape), 0)], [*input.shape[: -len(shape)], *[1] * len(shape)]
    return _normalized(input, weight, bias, _Kind(dims, shape, by_example, eps, forward, again, pull_back), demand)


def group_norm(
    demand: Demand,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.group_norm``, as layer normalization of the groups; ``None`` if it cannot be taken over."""
    # Of numbers that do not fit, torch.nn.functional says what is wrong.
    unfit = input.ndim < 2 or input.shape[1] % num_groups != 0 or input.numel() == num_groups
    if unfit or in_transform() or not _can_take(input, weight, bias):
        return None
    groups = input.reshape(len(input), num_groups, -1)
    y = layer_norm(demand, groups, groups.shape[2:], eps=eps)
    assert y is not None
    y = y.reshape(input.shape)
    if input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)
    by_channel = [-1, *[1] * (input.ndim - 2)]
    y = y if weight is None else y * weight.view(by_channel)
    return y if bias is None else y + bias.view(by_channel)


def instance_norm(
    demand: Demand,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.instance_norm``, as a group for each channel; ``None`` if it cannot be taken over."""
    without_running = use_input_stats and running_mean is None and running_var is None
    if not without_running or input.ndim < 3 or input.numel() == input.shape[0] * input.shape[1]:
        return None
    return group_norm(demand, input, input.shape[1], weight, bias, eps)


def _can_take(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    # A model may have its normalizations in float32 and the rest in bfloat16.
    return is_plain(input) and input.numel() > 0 and all(x is None or x.dtype == input.dtype for x in (weight, bias))


Bars = tuple[Tensor, Tensor, Tensor]
"""Derivatives for x, γ and β; also y with its mean and r."""


class _Kind(NamedTuple):
    """A normalization, but for the tensors.

    Attributes:
        dims: The dimensions that are normalized together.
        shape: The shape in which γ and β broadcast with x.
        statistics: That in which m(x) and r do.
        eps: ε.
        forward: y, m(x) and r, of x, γ and β.
        again: y alone, of x, m(x), r, γ and β.
        pull_back: The first derivative of ȳ, with x, γ, m(x), r, and which of the results are wanted.
    """

    dims: list[int]
    shape: list[int]
    statistics: list[int]
    eps: float
    forward: Callable[[Tensor, Tensor | None, Tensor | None], Bars]
    again: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    pull_back: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Wanted], Bars]

    def as_written(self, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        """y by plain arithmetic."""
        centred = x - x.mean(self.dims, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(self.dims, keepdim=True) + self.eps)
        y = y if w is None else y * w.view(self.shape)
        return y if bias is None else y + bias.view(self.shape)


def _normalized(x: Tensor, w: Tensor | None, bias: Tensor | None, kind: _Kind, demand: Demand) -> Tensor:
    if in_transform():  # for derivatives of its own, a loss with a penalty
        return kind.as_written(x, w, bias)
    y: Tensor = _Normalization.apply(x, w, bias, kind, demand)  # type: ignore[no-untyped-call]
    return y


class _Normalization(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, bias: Tensor | None, kind: _Kind, demand: Demand) -> Tensor:
        y, mean, r = kind.forward(x, w, bias)
        ctx.save_for_backward(x, w, mean, r)
        ctx.kind, ctx.demand = kind, demand
        return y

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        bars = _PulledBack.apply(y_bar, *ctx.saved_tensors, wanted, ctx.kind, ctx.demand)  # type: ignore[no-untyped-call]
        return *bars, None, None


class _PulledBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y_bar: Tensor,
        x: Tensor,
        w: Tensor | None,
        mean: Tensor,
        r: Tensor,
        wanted: Wanted,
        kind: _Kind,
        demand: Demand,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(y_bar, x, w, mean, r)
        ctx.kind, ctx.demand = kind, demand
        ctx.set_materialize_grads(False)
        bars = kind.pull_back(y_bar, x, w, mean, r, wanted)
        return tuple(bar if is_wanted else None for bar, is_wanted in zip(bars, wanted, strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        y_bar, x, w, mean, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            second = _second_as_written(y_bar, x, w, cotangents, ctx.kind)
        else:
            second = _second(y_bar, x, w, mean, r, cotangents, ctx.kind, ctx.demand)
        return *second, None, None, None, None, None


Second = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The second derivative for ȳ, x and γ."""


def _second(
    y_bar: Tensor,
    x: Tensor,
    w: Tensor | None,
    mean: Tensor,
    r: Tensor,
    cotangents: Sequence[Tensor | None],
    kind: _Kind,
    demand: Demand,
) -> Second:
    """By the equations above."""

    def project(v: Tensor) -> Tensor:
        return kind.pull_back(v, x, None, mean, r, (True, False, False))[0]  # r·P

    def m(v: Tensor) -> Tensor:
        return v.mean(kind.dims, keepdim=True)

    X, G, B = cotangents
    X = torch.zeros_like(x) if X is None else X
    gamma = None if w is None else w.view(kind.shape)
    projected = project(X)
    for_y = projected if gamma is None else projected * gamma
    if G is not None or B is not None:
        for_y = kind.again(x, mean, r, G if B is None or G is not None else torch.zeros_like(B), B).add_(for_y)
    if not demand.inputs:
        return for_y, None, None

    x_hat, minus_r = kind.again(x, mean, r, None, None), -r.view(kind.statistics)
    u = y_bar if gamma is None else y_bar * gamma
    inner = (X * m(x_hat * u)).addcmul_(u, m(x_hat * X)).mul_(minus_r)
    if G is not None:
        inner.addcmul_(y_bar, G.view(kind.shape))
    for_x = project(inner).addcmul_(x_hat, minus_r * m(u * projected))
    for_w = None if w is None else (y_bar * projected).sum_to_size(kind.shape).view_as(w)
    return for_y, for_x, for_w


def _second_as_written(
    y_bar: Tensor, x: Tensor, w: Tensor | None, cotangents: Sequence[Tensor | None], kind: _Kind
) -> Second:
    """By autograd, to be differentiated in turn."""
    # What one view depends on, the others do not: ȳ has come from x.
    y_bar, x, w = y_bar.view_as(y_bar), x.view_as(x), None if w is None else w.view_as(w)
    B = cotangents[2]
    bias = None if B is None else torch.zeros_like(B, requires_grad=True)
    asked = [(v, bar) for v, bar in zip((x, w, bias), cotangents, strict=True) if v is not None and bar is not None]
    first = torch.autograd.grad(kind.as_written(x, w, bias), [v for v, _ in asked], y_bar, create_graph=True)
    moving = [(g, bar) for g, (_, bar) in zip(first, asked, strict=True) if g.requires_grad]
    inputs = [v for v in (y_bar, x, w) if v is not None and v.requires_grad]
    outputs, bars = [g for g, _ in moving], [bar for _, bar in moving]
    second = iter(torch.autograd.grad(outputs, inputs, bars, create_graph=True, allow_unused=True))
    for_y, for_x, for_w = (next(second) if v is not None and v.requires_grad else None for v in (y_bar, x, w))
    return for_y, for_x, for_w


FUNCTIONS = (_Normalization, _PulledBack)
