"""What each choice around the hypergradient is worth: studies of TPE with refinement in which one thing is otherwise.

A cell is a study that may cost a number of full trainings, counted in passes (``Prices()``), so that its rows are the
same on every machine of a kind. ``usual`` is the task as it is, with all trials refined, so that choices within a
refinement show; every other cell changes one choice.

    python benchmarks/ablations.py --out benchmarks/results/ablations.json

Finished cells are kept in the file and not run again. ``--quick`` runs one seed of one task on a tenth of the budget.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import grid
import optuna
import tables
import torch
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner

from optuna_greedyhg.hypergrad.cost import Prices
from optuna_greedyhg.hypergrad.estimators import Estimator, Greedy
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.report.anytime import mean_along_the_way
from optuna_greedyhg.report.runs import run_of
from optuna_greedyhg.tasks import make_task
from optuna_greedyhg.tasks.comparison import full_training
from optuna_greedyhg.tasks.methods import Method
from optuna_greedyhg.tasks.spending import spend
from optuna_greedyhg.trials.credit import Credit
from optuna_greedyhg.trials.policies import Always, Fraction, Never, Promising
from optuna_greedyhg.trials.records import was_refined
from optuna_greedyhg.trials.sampler import GreedyHGSampler

TASKS = ("wine-ridge", "digits-l2", "digits-heads")
SCORES = ("val_loss", "test_loss", "mean_val_loss", "mean_test_loss")


@dataclass(frozen=True)
class Choice:
    """A study of TPE with refinement.

    Attributes:
        estimator: The hypergradient's.
        settings: Fields of the task's ``Settings`` that are otherwise.
        factors: By which fields of the task's ``Settings`` are multiplied.
        horizon: Number of training steps in an outer step, of as many as the task makes in all; ``None`` is its own.
        credit: What TPE learns from.
        pruner: Of the study.
    """

    estimator: Estimator[Any] = Greedy()
    settings: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)
    horizon: int | None = None
    credit: Credit = "refined"
    pruner: BasePruner = field(default_factory=MedianPruner)


CHOICES: dict[str, Choice] = {
    "usual": Choice(),
    **{f"γ = {gamma:g}": Choice(Greedy(gamma)) for gamma in (0.0, 0.5, 0.99, 1.0)},
    "terminal": Choice(Greedy(terminal=True)),
    **{f"rank {rank}": Choice(Greedy(propagator=Spectral(rank=rank))) for rank in (2, 5, 10)},
    **{f"horizon {horizon}": Choice(horizon=horizon) for horizon in (5, 20)},
    **{f"outer lr ×{factor:g}": Choice(factors={"outer_lr": factor}) for factor in (0.1, 0.3, 3.0)},
    "steps ×½": Choice(factors={"n_outer_steps": 0.5}),
    "evaluations ×2": Choice(factors={"evaluate_every": 0.5}),
    "outer lr ×3, steps ×½, evaluations ×2": Choice(
        factors={"outer_lr": 3, "n_outer_steps": 0.5, "evaluate_every": 0.5}
    ),
    "decay 0.93": Choice(settings={"outer_decay": 0.93}),
    **{f"radius {radius:g}": Choice(settings={"trust_radius": radius}) for radius in (0.1, 1.0)},
    "no radius": Choice(settings={"trust_radius": None}),
    "no rebase": Choice(settings={"rebase": False}),
    "no patience": Choice(settings={"patience": None}),
    "refines half": Choice(settings={"policy": Fraction(0.5)}),
    "refines the best third": Choice(settings={"policy": Promising(0.3)}),
    "refines the best tenth": Choice(settings={"policy": Promising(0.1)}),
    "refines the best third from the first": Choice(settings={"policy": Promising(0.3, n_startup_trials=0)}),
    "refines the best tenth from the first": Choice(settings={"policy": Promising(0.1, n_startup_trials=0)}),
    **{
        f"refines the best tenth, at most {share:.0%} of the cost": Choice(
            settings={"policy": Promising(0.1, n_startup_trials=0, share=share)}
        )
        for share in (0.2, 0.4)
    },
    "refines none": Choice(settings={"policy": Never()}),
    "credit to seeds": Choice(credit="seed"),
    "no pruner": Choice(pruner=NopPruner()),
    "hyperband": Choice(pruner=HyperbandPruner(min_resource=5, max_resource=50)),
    "inherits tensors": Choice(settings={"inherit": True}),
    "fresh tensors": Choice(settings={"inherit": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES), metavar="CHOICE")
    parser.add_argument("--budget", type=float, default=30.0, help="in full trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    tasks, n_seeds, budget = arguments.tasks, arguments.seeds, arguments.budget
    if arguments.quick:
        tasks, n_seeds, budget = tasks[:1], 1, budget / 10
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

    cells = [
        {"task": task, "seed": seed, "choice": choice, "budget": budget}
        for seed, task, choice in product(range(n_seeds), tasks, arguments.choices)
    ]
    rows = grid.run(arguments.out, cells, run)
    for task in tasks:
        print(f"\n{task}, medians over {n_seeds} seeds:\n")
        print(table([row for row in rows if row["cell"]["task"] == task]))


def run(cell: grid.Cell) -> dict[str, Any]:
    choice, task = CHOICES[cell["choice"]], make_task(cell["task"], seed=cell["seed"])
    numbers = {name: getattr(task.settings, name) for name in choice.factors}
    scaled = {name: type(number)(number * choice.factors[name]) for name, number in numbers.items()}
    settings = replace(task.settings, **{"policy": Always(), **scaled, **choice.settings})
    if choice.horizon is not None:
        n_steps = settings.horizon * settings.n_outer_steps
        settings = replace(settings, horizon=choice.horizon, n_outer_steps=n_steps // choice.horizon)
    sampler = GreedyHGSampler(optuna.samplers.TPESampler(seed=cell["seed"]), credit=choice.credit)
    study = optuna.create_study(sampler=sampler, pruner=choice.pruner)
    budget = cell["budget"] * Prices().of(full_training(task))
    with tempfile.TemporaryDirectory() as folder:
        spend(
            study,
            task,
            Method(cell["choice"], "tpe", choice.estimator),
            budget=budget,
            prices=Prices(),
            settings=settings,
            artifact_store=optuna.artifacts.FileSystemArtifactStore(folder),
        )
    its = run_of(study, method=cell["choice"], seed=cell["seed"], prices=Prices(), budget=budget)
    return {
        "val_loss": its.score("val_loss"),
        "test_loss": its.score("test_loss"),
        "mean_val_loss": mean_along_the_way(its, "val_loss", its.curve[0].cost, budget),
        "mean_test_loss": mean_along_the_way(its, "test_loss", its.curve[0].cost, budget),
        "n_trials": its.n_trials,
        "n_refined": sum(was_refined(trial) for trial in study.trials),
        "cost": its.cost,
    }


def table(rows: list[grid.Row]) -> str:
    """One line a choice."""
    lines = []
    for choice in dict.fromkeys(row["cell"]["choice"] for row in rows):
        results = [row["result"] for row in rows if row["cell"]["choice"] == choice]
        medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
        scores = [f"{medians[score]:.4f}" for score in SCORES]
        lines.append([choice, *scores, f"{medians['n_refined']:.0f} of {medians['n_trials']:.0f}"])
    return tables.table(["", *(score.replace("_", " ") for score in SCORES), "refined trials"], lines)


if __name__ == "__main__":
    main()
