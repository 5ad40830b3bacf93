"""What the operators share that are taken over from PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

Wanted = tuple[bool, bool, bool]
"""Whether the derivatives with respect to input, weights and bias are wanted."""


@dataclass
class Demand:
    """What the next pass through second derivatives is for; shared by all operators of one graph.

    Autograd knows which results are wanted, and does not tell a function of Python's.

    Attributes:
        inputs: Whether the derivatives for x and w are wanted: if the product is with weights, or α lies behind them.
    """

    inputs: bool = True


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all that there are of them are dense tensors without ways of their own, outside autocast."""
    given = [x for x in tensors if x is not None]
    strided = all(isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested for x in given)
    return strided and type(given[0]) is Tensor and not torch.is_autocast_enabled(given[0].device.type)


def in_transform(*tensors: Tensor | None) -> bool:
    """Whether a loss is differentiating by ``torch.func`` or by forward-mode AD itself."""
    # torch.autograd.Function asks the same, in private.
    active: bool = torch._C._are_functorch_transforms_active()
    return active or any(x is not None and _is_dual(x) for x in tensors)


def _is_dual(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
