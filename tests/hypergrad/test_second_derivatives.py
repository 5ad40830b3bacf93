from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optuna_greedyhg.hypergrad.second_derivatives import Demand, LeanConvolutions

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


def derivatives(convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """y, then the first derivatives of a loss that is not linear in y, then their products with constant cotangents."""
    y = convolve(*leaves) if len(leaves) == 3 else convolve(*leaves, None)
    first = torch.autograd.grad(y.square().sum() + y.sin().sum(), leaves, create_graph=True)
    torch.manual_seed(1)
    second = torch.autograd.grad(first, leaves, [torch.randn_like(g) for g in first])
    return [y, *first, *second]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "geometry"), list(itertools.product([1, 2, 3], GEOMETRIES)))
def test_all_derivatives_are_those_of_torch(n: int, geometry: dict[str, int], bias: bool) -> None:
    torch.manual_seed(0)
    groups = geometry.get("groups", 1)
    leaves = [random(3, 4, *[7] * n, requires_grad=True), random(6, 4 // groups, *[3] * n, requires_grad=True)]
    if bias:
        leaves.append(random(6, requires_grad=True))

    def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return CONVOLUTIONS[n](x, w, b, **geometry)

    expected = derivatives(convolve, leaves)
    with LeanConvolutions(Demand()):
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

    def derivatives() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(torch.conv2d(*leaves), leaves, y_bar, create_graph=True)
        chosen = [first[i] for i in given]
        return torch.autograd.grad(chosen, [y_bar, *leaves], [g.detach() for g in chosen], materialize_grads=True)

    expected = derivatives()
    with LeanConvolutions(Demand()):
        result = derivatives()
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_without_demand_only_the_way_to_the_gradient_is_computed() -> None:
    torch.manual_seed(0)
    x, w, y_bar = random(2, 3, 5, 5, requires_grad=True), random(4, 3, 3, 3), random(2, 4, 3, 3, requires_grad=True)
    w.requires_grad_()
    demand = Demand(inputs=False)
    with LeanConvolutions(demand):
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
    with LeanConvolutions(Demand()) as operators:
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
    with LeanConvolutions(Demand()) as operators:
        y = layer(x)
    assert not operators.found
    assert type(y.grad_fn).__name__ != "_ConvolutionBackward"
    torch.testing.assert_close(y, layer(x))


def test_mixed_precision_is_left_to_torch() -> None:
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    with LeanConvolutions(Demand()), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert type(y.grad_fn).__name__ != "_ConvolutionBackward"
