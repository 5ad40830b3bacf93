"""Ready-made problems on real data, which the demo, the benchmarks and the tests share.

Each has train, validation and test splits. ``make_task`` builds one by name.
"""

from __future__ import annotations

from pathlib import Path

import torch

from optuna_greedyhg.tasks.base import Settings, Task, make_objective
from optuna_greedyhg.tasks.digits import DigitsCleaning, DigitsL2
from optuna_greedyhg.tasks.fashion import FashionCleaning
from optuna_greedyhg.tasks.idx import DataError

__all__ = [
    "TASKS",
    "DataError",
    "DigitsCleaning",
    "DigitsL2",
    "FashionCleaning",
    "Settings",
    "Task",
    "make_objective",
    "make_task",
]

TASKS: dict[str, str] = {task.name: task.summary for task in (DigitsCleaning, DigitsL2, FashionCleaning)}
"""What there is: summaries by name."""


def make_task(name: str, *, seed: int = 0, device: torch.device | str = "cpu", folder: Path | None = None) -> Task:
    """Builds a task by its name.

    Args:
        name: A key of ``TASKS``.
        seed: Seeds its data and initial weights.
        device: Where to compute.
        folder: Holds the data of tasks that do not come with a library.

    Raises:
        KeyError: If there is no task of this name.
        DataError: If its data is not there.
    """
    if name == DigitsCleaning.name:
        return DigitsCleaning(seed, device)
    if name == DigitsL2.name:
        return DigitsL2(seed, device)
    if name == FashionCleaning.name:
        return FashionCleaning(folder, seed, device)
    raise KeyError(f"No task {name!r}; there are {', '.join(TASKS)}.")
