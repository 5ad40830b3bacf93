"""What the operators share that are taken over from PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def is_plain(x: Tensor) -> bool:
    """Whether it is a tensor without ways of its own, outside autocast."""
    return type(x) is Tensor and not torch.is_autocast_enabled(x.device.type)


def in_transform() -> bool:
    """Whether a loss is using ``torch.func`` itself, in which torch.autograd.Function asks the same, in private."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active
