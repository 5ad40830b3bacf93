"""Wall-clock times of functions that are compared with each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def side_by_side(functions: Sequence[Callable[[], object]], device: torch.device, n_repeats: int) -> list[float]:
    """The median time of each in seconds; in turns, as what else the machine does changes from second to second."""
    times = [[_seconds_of(function, device) for function in functions] for _ in range(n_repeats)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def _seconds_of(function: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
