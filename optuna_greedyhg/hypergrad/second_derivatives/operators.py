"""Which of PyTorch's functions are taken over, and by what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from optuna_greedyhg.hypergrad.second_derivatives import convolutions, normalizations
from optuna_greedyhg.hypergrad.second_derivatives.base import Demand

_LEAN: Mapping[Callable[..., Tensor], Callable[..., Tensor | None]] = {
    torch.conv1d: partial(convolutions.convolve, 1),
    torch.conv2d: partial(convolutions.convolve, 2),
    torch.conv3d: partial(convolutions.convolve, 3),
    functional.batch_norm: normalizations.batch_norm,
    functional.layer_norm: normalizations.layer_norm,
    functional.group_norm: normalizations.group_norm,
    functional.instance_norm: normalizations.instance_norm,
}
"""Each with its own arguments after the ``Demand``; the result is ``None`` if they are left to PyTorch."""

_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

_NAMES = {f"{cls.__name__}Backward" for cls in (*convolutions.FUNCTIONS, *normalizations.FUNCTIONS)}


class LeanOperators(TorchFunctionMode):
    """Within it, the layers of ``torch.nn`` for convolution and normalization have these second derivatives.

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
        lean = _LEAN.get(function)
        y = None if lean is None else lean(self._demand, *args, **kwargs)
        if y is None:
            return function(*args, **kwargs)
        self.found = True
        return y


def has_lean_layers(module: nn.Module) -> bool:
    """Whether one of its parts calls such a function, though perhaps not at each step."""
    return any(isinstance(part, _LAYERS) for part in module.modules())


def lean_among(nodes: Iterable[Node]) -> set[Node]:
    """Those nodes of a graph that have been taken over."""
    return {node for node in nodes if type(node).__name__ in _NAMES}
