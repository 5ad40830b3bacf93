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


Results = tuple[Tensor, Tensor | None, Tensor | None]
"""The derivatives for x, γ and β."""


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
    if not training or input.ndim < 2 or input.numel() == input.shape[1] or eps <= 0:
        return None
    size = input.shape[1:2]
    if not (_fit(size, running_mean, running_var) and _can_take(input, size, weight, bias)):
        return None
    transformed = in_transform(input, weight, bias)
    if transformed and running_mean is not None:
        return None  # to whose statistics the transform gives other values

    def forward(x: Tensor, w: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_batch_norm(x, w, bias, running_mean, running_var, True, momentum, eps)

    def again(x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.batch_norm(x, mean, r**-2 - eps, w, bias, False, eps=eps)

    def pull_back(y_bar: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, wanted: Wanted) -> Results:
        bars: Results = _batch_norm_backward(y_bar, x, w, None, None, mean, r, True, eps, [*wanted])
        return bars

    dims, by_channel = [d for d in range(input.ndim) if d != 1], [*size, *[1] * (input.ndim - 2)]
    kind = _Kind(dims, by_channel, by_channel, eps, forward, again, pull_back)
    return kind.as_written(input, weight, bias) if transformed else _normalized(input, weight, bias, kind, demand)


def layer_norm(
    demand: Demand,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.layer_norm``; ``None`` if it cannot be taken over."""
    shape = torch.Size(normalized_shape)
    if not _can_take(input, shape, weight, bias) or input.shape[-len(shape) :] != shape:
        return None

    def forward(x: Tensor, w: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return torch.native_layer_norm(x, shape, w, bias, eps)

    def again(x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        return functional.layer_norm(x, shape, w, bias, eps)

    def pull_back(y_bar: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, wanted: Wanted) -> Results:
        like_bias = x.new_empty(shape) if wanted[2] else None  # of which the operator reads the shape alone
        bars: Results = _layer_norm_backward(y_bar, x, shape, mean, r, w, like_bias, [*wanted])
        return bars

    dims, by_example = [*range(-len(shape), 0)], [*input.shape[: -len(shape)], *[1] * len(shape)]
    kind = _Kind(dims, [*shape], by_example, eps, forward, again, pull_back)
    transformed = in_transform(input, weight, bias)
    return kind.as_written(input, weight, bias) if transformed else _normalized(input, weight, bias, kind, demand)


def group_norm(
    demand: Demand,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.group_norm``; ``None`` if it cannot be taken over."""
    if input.ndim < 2 or num_groups < 1 or input.shape[1] % num_groups or input.numel() == num_groups:
        return None
    # PyTorch's third derivative is right; so it has those within transforms.
    if in_transform(input, weight, bias) or not _can_take(input, input.shape[1:2], weight, bias):
        return None
    shape = torch.Size([input.shape[1] // num_groups, input[0, 0].numel()])
    by_channel = [num_groups, shape[0], 1]

    def forward(x: Tensor, w: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x_hat, mean, r = torch.native_layer_norm(x, shape, None, None, eps)
        return _affine(x_hat, w, bias, by_channel), mean, r

    def again(x: Tensor, mean: Tensor, r: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        return _affine(functional.layer_norm(x, shape, eps=eps), w, bias, by_channel)

    def pull_back(y_bar: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, wanted: Wanted) -> Results:
        u = _affine(y_bar, w, None, by_channel)
        x_bar, *_ = _layer_norm_backward(u, x, shape, mean, r, None, None, [True, False, False])
        products = y_bar * again(x, mean, r, None, None) if wanted[1] else None
        w_bar, bias_bar = (None if v is None else v.sum_to_size(by_channel).flatten() for v in (products, y_bar))
        return x_bar, w_bar, bias_bar

    groups = input.reshape(len(input), num_groups, *shape)
    kind = _Kind([2, 3], by_channel, [*groups.shape[:2], 1, 1], eps, forward, again, pull_back)
    y = _normalized(groups, weight, bias, kind, demand).reshape(input.shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.ndim)
    return y.contiguous(memory_format=last) if last and input.is_contiguous(memory_format=last) else y


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
    has_running = not use_input_stats or running_mean is not None or running_var is not None
    if has_running or input.ndim < 3 or input.numel() == input.shape[0] * input.shape[1]:
        return None
    return group_norm(demand, input, input.shape[1], weight, bias, eps)


def _can_take(input: Tensor, size: torch.Size, weight: Tensor | None, bias: Tensor | None) -> bool:
    # Sizes that do not fit are left to PyTorch, which says so; the operators of its core take them as they are. A model
    # may have its normalizations in float32 and the rest in bfloat16.
    plain = is_plain(input, weight, bias) and input.numel() > 0 and _fit(size, weight, bias)
    return plain and all(x is None or x.dtype == input.dtype for x in (weight, bias))


def _fit(size: torch.Size, *tensors: Tensor | None) -> bool:
    return all(x is None or x.shape == size for x in tensors)


def _affine(x_hat: Tensor, w: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    """γ·x̂ + β, with as much of it as there is."""
    y = x_hat if w is None else x_hat * w.view(shape)
    return y if bias is None else y + bias.view(shape)


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
    forward: Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    again: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
    pull_back: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Wanted], Results]

    def as_written(self, x: Tensor, w: Tensor | None, bias: Tensor | None) -> Tensor:
        """y by plain arithmetic, for a loss that takes derivatives of its own."""
        centred = x - x.mean(self.dims, keepdim=True)
        x_hat = centred * torch.rsqrt(centred.square().mean(self.dims, keepdim=True) + self.eps)
        return _affine(x_hat, w, bias, self.shape)


def _normalized(x: Tensor, w: Tensor | None, bias: Tensor | None, kind: _Kind, demand: Demand) -> Tensor:
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
        if all(bar is None for bar in cotangents):
            second: Second = (None, None, None)
        elif torch.is_grad_enabled():
            second = _second_as_written(y_bar, x, w, cotangents, ctx.kind)
        else:
            inputs = ctx.demand.inputs and any(ctx.needs_input_grad[1:3])
            second = _second(y_bar, x, w, mean, r, cotangents, ctx.kind, inputs)
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
    inputs: bool,
) -> Second:
    """By the equations above; for ȳ alone, unless the others are wanted."""

    def project(v: Tensor) -> Tensor:
        return kind.pull_back(v, x, None, mean, r, (True, False, False))[0]  # r·P

    def m(v: Tensor) -> Tensor:
        return v.mean(kind.dims, keepdim=True)

    X, G, B = cotangents
    through_G = None if G is None or not inputs else y_bar * G.view(kind.shape)
    affine = None
    if G is not None or B is not None:
        affine = kind.again(x, mean, r, G if B is None or G is not None else torch.zeros_like(B), B)
    if X is None:
        return affine, None if through_G is None else project(through_G), None
    projected = project(X)
    scaled = _affine(projected, w, None, kind.shape)
    for_y = scaled if affine is None else affine.add_(scaled)
    if not inputs:
        return for_y, None, None
    x_hat, minus_r = kind.again(x, mean, r, None, None), -r.view(kind.statistics)
    u = _affine(y_bar, w, None, kind.shape)
    coupled = (X * m(x_hat * u)).addcmul_(u, m(x_hat * X)).mul_(minus_r)
    for_x = project(coupled if through_G is None else coupled.add_(through_G))
    for_x = for_x.addcmul_(x_hat, minus_r * m(u * projected))
    return for_y, for_x, None if w is None else (y_bar * projected).sum_to_size(kind.shape).view_as(w)


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
