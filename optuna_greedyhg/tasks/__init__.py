"""Ready-made problems on real data, which the demo, the benchmarks and the tests share.

Each has train, validation and test splits. ``make_task`` builds one by name.
"""

from __future__ import annotations

from pathlib import Path

import torch

from optuna_greedyhg.tasks.base import Settings, Task, make_objective
from optuna_greedyhg.tasks.digits import DigitsCleaning, DigitsL2
from optuna_greedyhg.tasks.digits_augment import DigitsAugment
from optuna_greedyhg.tasks.digits_heads import DigitsHeads
from optuna_greedyhg.tasks.digits_mixed import DigitsMixed
from optuna_greedyhg.tasks.digits_mlp import DigitsMLP
from optuna_greedyhg.tasks.digits_warp import DigitsWarp
from optuna_greedyhg.tasks.fashion import FashionCleaning
from optuna_greedyhg.tasks.fashion_weights import FashionWeights
from optuna_greedyhg.tasks.idx import DataError
from optuna_greedyhg.tasks.tabular import BreastCancerRidge, DiabetesRidge, WineRidge

__all__ = [
    "FROM_FOLDER",
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

_BUILT_IN = {
    task.name: task
    for task in (
        DigitsCleaning,
        DigitsL2,
        DigitsMLP,
        DigitsAugment,
        DigitsHeads,
        DigitsMixed,
        DigitsWarp,
        DiabetesRidge,
        BreastCancerRidge,
        WineRidge,
    )
}
_OF_FOLDERS = {task.name: task for task in (FashionCleaning, FashionWeights)}

FROM_FOLDER = frozenset(_OF_FOLDERS)
"""The tasks whose data does not come with a library."""
TASKS: dict[str, str] = {name: task.summary for name, task in (_BUILT_IN | _OF_FOLDERS).items()}
"""What there is: summaries by name."""


def make_task(name: str, *, seed: int = 0, device: torch.device | str = "cpu", folder: Path | None = None) -> Task:
    """Builds a task by its name.

    Args:
        name: A key of ``TASKS``.
        seed: Seeds its data and initial weights.
        device: Where to compute.
        folder: Holds the data of tasks in ``FROM_FOLDER``.

    Raises:
        KeyError: If there is no task of this name.
        DataError: If its data is not there.
    """
    if name in _BUILT_IN:
        task: Task = _BUILT_IN[name](seed, device)
        return task
    if name in _OF_FOLDERS:
        return _OF_FOLDERS[name](folder, seed, device)
    raise KeyError(f"No task {name!r}; there are {', '.join(TASKS)}.")
