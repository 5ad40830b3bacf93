"""Weight normalization, w = g·v/‖v‖, computed as it is written.

In PyTorch it is a fused operator, which has no forward derivative, and whose second derivative fails PyTorch's own
check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


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


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # Of all entries, norm_except_dim gives forward derivatives of another shape than its result.
    norm = torch.linalg.vector_norm(v) if dim == -1 else torch.norm_except_dim(v, 2, dim)
    return v * (g / norm)
