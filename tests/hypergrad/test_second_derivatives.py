from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from optuna_greedyhg.hypergrad.second_derivatives import Demand, LeanOperators

CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"groups": 2},
    {"stride": [2], "padding": [1], "groups": 2},
]


def random(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(requires_grad)


def derivatives(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """y, then the first derivatives of a loss that is not linear in y, then their products with constant cotangents."""
    y = function(*leaves)
    first = torch.autograd.grad(y.square().sum() + y.sin().sum(), leaves, create_graph=True)
    torch.manual_seed(1)
    second = torch.autograd.grad(first, leaves, [torch.randn_like(g) for g in first])
    return [y, *first, *second]


def products_of_some(
    function: Callable[..., Tensor], leaves: list[Tensor], y_bar: Tensor, given: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """For ȳ and the leaves, when of the first derivatives only those given have a cotangent."""
    first = torch.autograd.grad(function(*leaves), leaves, y_bar, create_graph=True)
    chosen = [first[i] for i in given]
    return torch.autograd.grad(chosen, [y_bar, *leaves], [g.detach() for g in chosen], materialize_grads=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "geometry"), list(itertools.product([1, 2, 3], GEOMETRIES)))
def test_all_derivatives_are_those_of_torch(n: int, geometry: dict[str, int], bias: bool) -> None:
    torch.manual_seed(0)
    groups = geometry.get("groups", 1)
    leaves = [random(3, 4, *[7] * n, requires_grad=True), random(6, 4 // groups, *[3] * n, requires_grad=True)]
    if bias:
        leaves.append(random(6, requires_grad=True))

    def convolve(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return CONVOLUTIONS[n](x, w, b, **geometry)

    expected = derivatives(convolve, leaves)
    with LeanOperators(Demand()):
        result = derivatives(convolve, leaves)
    assert type(result[0].grad_fn).__name__ == "_ConvolutionBackward"
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_cotangents_that_are_missing(given: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    leaves = [random(2, 3, 5, 5, requires_grad=True), random(4, 3, 3, 3, requires_grad=True)]
    leaves.append(random(4, requires_grad=True))
    y_bar = random(2, 4, 3, 3, requires_grad=True)

    expected = products_of_some(torch.conv2d, leaves, y_bar, given)
    with LeanOperators(Demand()):
        result = products_of_some(torch.conv2d, leaves, y_bar, given)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_without_demand_only_the_way_to_the_gradient_is_computed() -> None:
    torch.manual_seed(0)
    x, w, y_bar = random(2, 3, 5, 5, requires_grad=True), random(4, 3, 3, 3), random(2, 4, 3, 3, requires_grad=True)
    w.requires_grad_()
    demand = Demand(inputs=False)
    with LeanOperators(demand):
        first = torch.autograd.grad(torch.conv2d(x, w), [x, w], y_bar, create_graph=True)
    cotangents = [g.detach() for g in first]
    calls = {}
    for demand.inputs in (False, True):
        with torch.profiler.profile() as profiler:
            (result,) = torch.autograd.grad(first, [y_bar], cotangents, retain_graph=True)
        expected = torch.conv2d(cotangents[0], w) + torch.conv2d(x, cotangents[1])
        torch.testing.assert_close(result, expected)
        calls[demand.inputs] = sum(event.count for event in profiler.key_averages() if "convolution" in event.key)
    assert calls[False] < calls[True]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 5)),
        (nn.Conv1d(3, 4, 3), (2, 3, 5)),
    ],
)
def test_it_reaches_into_modules(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with LeanOperators(Demand()) as operators:
        assert type(layer(x).grad_fn).__name__ == "_ConvolutionBackward"
    assert operators.found


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 4, 3), (3, 5, 5)),  # no batch
        (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 5)),
        (nn.ConvTranspose2d(3, 4, 3), (2, 3, 5, 5)),
    ],
)
def test_what_it_does_not_know_is_left_to_torch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with LeanOperators(Demand()) as operators:
        y = layer(x)
    assert not operators.found
    assert type(y.grad_fn).__name__ != "_ConvolutionBackward"
    torch.testing.assert_close(y, layer(x))


def test_mixed_precision_is_left_to_torch() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    with LeanOperators(Demand()), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert type(y.grad_fn).__name__ != "_ConvolutionBackward"


class Normalization:
    """A function of x and those of γ and β that it has, by PyTorch, and as it is written.

    PyTorch has no second derivative of a bias without weights, and a wrong third one.
    """

    def __init__(self, kind: str, affine: tuple[str, ...], shape: tuple[int, ...]) -> None:
        self.kind, self.affine = kind, affine
        self.parameters = shape[1:] if kind == "layer" else (shape[1],)
        torch.manual_seed(0)
        self.leaves = [random(*shape, requires_grad=True)]
        self.leaves += [random(*self.parameters, requires_grad=True) for _ in affine]

    def __call__(self, x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(self.affine, parameters, strict=True))
        if self.kind == "batch":
            return functional.batch_norm(x, None, None, **named, training=True)
        if self.kind == "layer":
            return functional.layer_norm(x, self.parameters, **named)
        return functional.group_norm(x, 2, **named) if self.kind == "group" else functional.instance_norm(x, **named)

    def written(self, x: Tensor, *parameters: Tensor) -> Tensor:
        first = {"batch": [0, *range(2, x.ndim)], "instance": [*range(2, x.ndim)]}
        grouped = x.unflatten(1, (2, -1)) if self.kind == "group" else x
        dims = first.get(self.kind, [*range(2 if self.kind == "group" else 1, grouped.ndim)])
        variance = grouped.var(dims, correction=0, keepdim=True)
        x_hat = ((grouped - grouped.mean(dims, keepdim=True)) / (variance + 1e-5).sqrt()).view_as(x)
        shape = self.parameters if self.kind == "layer" else [-1, *[1] * (x.ndim - 2)]
        named = {name: p.view(shape) for name, p in zip(self.affine, parameters, strict=True)}
        return named.get("weight", torch.ones(())) * x_hat + named.get("bias", torch.zeros(()))


KINDS = ["batch", "layer", "group", "instance"]
AFFINE = [(), ("weight",), ("bias",), ("weight", "bias")]


@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (kind, shape)
        for kind in KINDS
        for shape in [(5, 4), (5, 4, 3), (5, 4, 3, 2)]
        if (kind, shape) != ("instance", (5, 4))
    ],
    ids=str,
)
def test_all_derivatives_of_a_normalization(kind: str, affine: tuple[str, ...], shape: tuple[int, ...]) -> None:
    case = Normalization(kind, affine, shape)
    expected = derivatives(case.written, case.leaves)
    with LeanOperators(Demand()) as operators:
        result = derivatives(case, case.leaves)
    assert operators.found
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_that_are_missing_at_a_normalization(kind: str, given: tuple[int, ...]) -> None:
    case = Normalization(kind, ("weight", "bias"), (5, 4, 3))
    y_bar = random(5, 4, 3, requires_grad=True)

    expected = products_of_some(case.written, case.leaves, y_bar, given)
    with LeanOperators(Demand()):
        result = products_of_some(case, case.leaves, y_bar, given)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_third_derivative_of_a_normalization(kind: str, affine: tuple[str, ...]) -> None:
    case = Normalization(kind, affine, (5, 4, 3))

    def third(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        x, *_ = case.leaves
        (slope,) = torch.autograd.grad(function(*case.leaves).sin().sum(), x, create_graph=True)
        first = torch.autograd.grad(slope.square().sum(), [x, *case.leaves[1:]], create_graph=True, allow_unused=True)
        some = [g for g in first if g is not None and g.requires_grad]
        return torch.autograd.grad(some, case.leaves, [g.detach() for g in some], materialize_grads=True)

    expected = third(case.written)
    with LeanOperators(Demand()):
        result = third(case)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_without_demand_a_normalization_computes_the_way_to_the_gradient_alone(kind: str) -> None:
    case = Normalization(kind, ("weight", "bias"), (5, 4, 3))
    y_bar, demand = random(5, 4, 3, requires_grad=True), Demand(inputs=False)
    with LeanOperators(demand):
        first = torch.autograd.grad(case(*case.leaves), case.leaves, y_bar, create_graph=True)
    results, n_operations = {}, {}
    for demand.inputs in (False, True):
        with torch.profiler.profile() as profiler:
            (results[demand.inputs],) = torch.autograd.grad(
                first, [y_bar], [g.detach() for g in first], retain_graph=True
            )
        n_operations[demand.inputs] = sum(event.count for event in profiler.key_averages())
    torch.testing.assert_close(results[False], results[True])
    assert n_operations[False] < n_operations[True]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_torch(momentum: float | None) -> None:
    layers = [nn.BatchNorm2d(3, momentum=momentum) for _ in range(2)]
    for x in torch.randn(4, 5, 3, 2, 2):
        expected = layers[0](x)
        with LeanOperators(Demand()) as operators:
            y = layers[1](x)
        assert operators.found
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalization_in_bfloat16(kind: str) -> None:
    case = Normalization(kind, ("weight", "bias"), (50, 4, 3))
    leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in case.leaves]
    expected = derivatives(case, leaves)
    with LeanOperators(Demand()) as operators:
        result = derivatives(case, leaves)
    assert operators.found
    for a, b in zip(result, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (nn.BatchNorm1d(3).eval(), torch.float32),
        (nn.BatchNorm1d(3), torch.bfloat16),
        (nn.InstanceNorm1d(3, track_running_stats=True), torch.float32),
    ],
    ids=["of running statistics", "of another type", "with running statistics"],
)
def test_which_normalizations_are_left_to_torch(layer: nn.Module, dtype: torch.dtype) -> None:
    with LeanOperators(Demand()) as operators:
        layer(torch.randn(4, 3, 2, dtype=dtype))
    assert not operators.found


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)], ids=str)
def test_a_normalization_keeps_channels_last(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    with LeanOperators(Demand()) as operators:
        assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert operators.found


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (1, 3)),
        (nn.BatchNorm1d(2), (5, 3)),
        (nn.BatchNorm1d(4), (5, 3)),
        (nn.BatchNorm1d(1, affine=False), (5, 8)),
        (nn.BatchNorm1d(4, track_running_stats=False), (5, 3)),
        (nn.BatchNorm1d(3, eps=0.0), (5, 3)),
        (nn.LayerNorm(2), (5, 3)),
        (nn.LayerNorm([4, 3]), (5, 3)),
        (nn.GroupNorm(3, 3), (1, 3)),
        (nn.GroupNorm(1, 4), (2, 1, 3)),
        (nn.GroupNorm(2, 4), (2, 3, 3)),
        (nn.InstanceNorm1d(3), (2, 3, 1)),
    ],
    ids=str,
)
def test_what_pytorch_refuses_is_refused_by_it(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """Its core's operators, without the layers around them, would read and write beyond the ends of tensors."""
    x = torch.randn(shape)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        layer(x)
    with LeanOperators(Demand()), pytest.raises(expected.type, match=re.escape(str(expected.value))):
        layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalization_within_forward_mode(kind: str) -> None:
    case = Normalization(kind, ("weight", "bias"), (5, 4, 3))
    x, *parameters = [leaf.detach() for leaf in case.leaves]
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(lambda x: case.written(x, *parameters), (x,), (tangent,))
    with LeanOperators(Demand()), forward_ad.dual_level():
        y = case(forward_ad.make_dual(x, tangent), *parameters)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_to_torch() -> None:
    layer = nn.LayerNorm(3)
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.strided)
    with LeanOperators(Demand()) as operators:
        layer(x)
    assert not operators.found


@pytest.mark.parametrize("kind", KINDS)
def test_a_normalization_of_data_without_derivatives(kind: str) -> None:
    case = Normalization(kind, ("weight", "bias"), (5, 4, 3))
    x, *parameters = case.leaves
    y_bar = random(5, 4, 3, requires_grad=True)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(x.detach(), *parameters), parameters, y_bar, create_graph=True)
        return torch.autograd.grad(first, [y_bar], [g.detach() for g in first])

    expected = second(case.written)
    with LeanOperators(Demand()):
        result = second(case)
    torch.testing.assert_close(result, expected)


class Dead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> None:
        return None


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_normalization_from_which_nothing_is_wanted(kind: str, create_graph: bool) -> None:
    case = Normalization(kind, ("weight",), (5, 4, 3))
    with LeanOperators(Demand()):
        (slope,) = torch.autograd.grad(case(*case.leaves).sin().sum(), case.leaves[:1], create_graph=True)
    result = torch.autograd.grad(
        Dead.apply(slope).sum(), case.leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    assert not any(g.any() for g in result)
