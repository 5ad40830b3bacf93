"""What does a better hypergradient buy? One descent from a task's defaults with every estimator, judged alike.

The value of α is that of a training from scratch under it, as in a trial; a run's best α by validation loss is judged
on the test split. Cost is that of the descent, evaluations included.

    python benchmarks/descents.py --out benchmarks/results/descents.json

Finished runs are kept in the file and not run again. ``--quick`` runs one seed of one task.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import grid
import tables
import torch
from optuna.trial import FixedTrial

from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.estimators.named import ESTIMATORS
from optuna_greedyhg.tasks import make_task
from optuna_greedyhg.trials.alpha import Alpha

METHODS = ("t1t2", "greedy", "spectral", "terminal", "ift", "distill", "drmad", "reverse")
TASKS = ("digits-cleaning", "digits-l2")
SCORES = ("val_loss", "test_loss", "test_accuracy", "cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    tasks, n_seeds = (arguments.tasks[:1], 1) if arguments.quick else (arguments.tasks, arguments.seeds)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*sees no effect of the hyperparameters")  # implicit, of lr

    cells = [{"task": t, "seed": s, "method": m} for s, t, m in product(range(n_seeds), tasks, METHODS)]
    rows = grid.run(arguments.out, cells, run)
    for task in tasks:
        print(f"\n{task}, medians over {n_seeds} seeds:\n")
        print(table([row for row in rows if row["cell"]["task"] == task]))


def run(cell: grid.Cell) -> dict[str, Any]:
    task = make_task(cell["task"], seed=cell["seed"])
    trial = FixedTrial(dict(task.defaults))
    alpha = Alpha(trial)
    problem, update_rule = task.define(trial, alpha)
    settings = task.settings
    *_, last = descend(
        problem,
        alpha.hyperparameters,
        update_rule=update_rule,
        estimator=ESTIMATORS[cell["method"]],
        horizon=settings.horizon,
        n_outer_steps=settings.n_outer_steps,
        outer_optimizer=settings.outer_optimizer,
        evaluate=settings.evaluate,
        evaluate_every=settings.evaluate_every,
    )
    best = last.best
    return {
        "val_loss": best.scores["loss"],
        "test_loss": best.test_scores["loss"],
        "test_accuracy": best.test_scores["accuracy"],
        "best_outer_step": best.outer_step,
        "cost": last.cost.total,
    }


def table(rows: list[grid.Row]) -> str:
    """One line a method."""
    lines = []
    for method in METHODS:
        results = [row["result"] for row in rows if row["cell"]["method"] == method]
        medians = [statistics.median(result[score] for result in results) for score in SCORES]
        lines.append([method, *(f"{x:.3f}" for x in medians[:-1]), f"{medians[-1] / 1000:.0f}"])
    return tables.table(["", "validation loss", "test loss", "test accuracy", "cost ×1000"], lines)


if __name__ == "__main__":
    main()
