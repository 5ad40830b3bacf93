"""Where to compute."""

from __future__ import annotations

import torch


def as_device(device: torch.device | str) -> torch.device:
    """The device of this name, where ``"auto"`` is the present CUDA device if there is one, and otherwise the CPU.

    Raises:
        ValueError: If it is a CUDA device, and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    named = torch.device(device)
    if named.type == "cuda" and not has_cuda:
        raise ValueError(
            f"device must be one that this machine has, but got {named} without CUDA; use 'auto' or 'cpu'."
        )
    return named
